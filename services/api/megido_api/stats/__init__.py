"""Statistics, from the counters that ingest keeps."""
