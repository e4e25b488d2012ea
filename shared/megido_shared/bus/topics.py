"""The one table of topics: admin calls, documentation and deployment resources are made from it."""

from dataclasses import dataclass
from typing import Literal

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic. `retention_ms` and `retention_bytes` (a partition) apply to deletion; -1 is no bound."""

    name: str
    partitions: int
    cleanup: Literal["delete", "compact", "compact,delete"]
    key: str
    retention_ms: int = 7 * DAY_MS
    retention_bytes: int = -1

    def config(self, replication: int) -> dict[str, str]:
        """The settings that a broker gets. A record is at most 4,000,000 bytes; a batch may hold a little more."""
        settings = {
            "cleanup.policy": self.cleanup,
            "max.message.bytes": "4194304",
            "min.insync.replicas": str(2 if replication >= 3 else 1),
        }
        if "delete" in self.cleanup:
            settings["retention.ms"] = str(self.retention_ms)
            settings["retention.bytes"] = str(self.retention_bytes)
        return settings


FLOWS = Topic("megido.flows", 12, "delete", "flow_id", retention_bytes=8 * 1024**3)
WEBSOCKET = Topic("megido.websocket", 12, "delete", "connection_id", retention_bytes=4 * 1024**3)
ERRORS = Topic("megido.errors", 3, "delete", "node")
AUTH = Topic("megido.auth", 3, "delete", "node")
REPLAY_COMMANDS = Topic("megido.replay.commands", 3, "delete", "job id")
REPLAY_RESULTS = Topic("megido.replay.results", 3, "delete", "job id")
CONFIG = Topic("megido.config", 1, "compact", "scope")
NODES = Topic("megido.nodes", 1, "compact,delete", "node")
DEAD_LETTERS = Topic("megido.dead-letters", 3, "delete", "source topic/partition/offset", retention_ms=90 * DAY_MS)

TOPICS = (
    FLOWS,
    WEBSOCKET,
    ERRORS,
    AUTH,
    REPLAY_COMMANDS,
    REPLAY_RESULTS,
    CONFIG,
    NODES,
    DEAD_LETTERS,
)
BY_NAME = {topic.name: topic for topic in TOPICS}
INGESTED = (FLOWS, WEBSOCKET, ERRORS, AUTH, NODES)
"""What ingest stores. Everything else is a notification or a copy for other readers."""
COUNTED = frozenset(topic.name for topic in (FLOWS, WEBSOCKET, ERRORS, AUTH))
"""What holds the records that accounting counts."""
