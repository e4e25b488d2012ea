"""JSON log files, written from the feed: a file an entry in the founding document's tree, or a line by hour."""

from megido_ingest.jsonlogs.layout import LAYOUTS, LogLayout
from megido_ingest.jsonlogs.writer import JsonLogWriter

__all__ = ["LAYOUTS", "JsonLogWriter", "LogLayout"]
