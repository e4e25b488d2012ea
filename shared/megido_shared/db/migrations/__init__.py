"""Alembic's environment: revisions in `versions/`, their SQL in `sql/`."""
