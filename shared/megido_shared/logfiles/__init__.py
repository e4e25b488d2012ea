"""JSON log files, for those who read and tidy them. `megido_ingest.jsonlogs` writes them."""

from megido_shared.logfiles.cleaning import cleanup
from megido_shared.logfiles.logger import ProxyLogger
from megido_shared.logfiles.place import below
from megido_shared.logfiles.reading import KINDS, Kind, recent

__all__ = ["KINDS", "Kind", "ProxyLogger", "below", "cleanup", "recent"]
