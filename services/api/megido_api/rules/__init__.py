"""Payload rules: kept in Postgres, published as one whole snapshot to every running proxy."""
