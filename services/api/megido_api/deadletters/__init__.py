"""Dead letters: records that could not be stored, looked at, put through ingest again, discarded."""
