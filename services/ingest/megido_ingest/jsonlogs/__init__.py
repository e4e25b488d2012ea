"""JSON log files in the founding document's tree, written from the feed."""

from megido_ingest.jsonlogs.reading import cleanup, recent
from megido_ingest.jsonlogs.writer import JsonLogWriter

__all__ = ["JsonLogWriter", "cleanup", "recent"]
