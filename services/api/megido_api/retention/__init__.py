"""Retention: its policy, its runs, pinned flows. Ingest's leader does the work."""
