"""The replayer service."""
