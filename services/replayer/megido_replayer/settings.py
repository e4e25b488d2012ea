"""The replayer's settings: read once at its start and passed on."""

from dataclasses import dataclass
from pathlib import Path

from megido_replayer.addresses import Endpoint
from megido_shared.bus.local.journal import DEFAULT_CAP_BYTES
from megido_shared.settings import METRICS_PORTS, Common

DEFAULT_METRICS_PORT = METRICS_PORTS["replayer"]
DEFAULT_MAX_BODY_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """`concurrency` is the number of items of one job that are sent at the same time, 1 keeps their order (a job
    with a delay always does); `max_jobs` is the number of jobs at the same time. `max_body_size` bounds what is
    stored of a body. `protected` are Megido's own endpoints, never replayed to. Times are seconds."""

    common: Common
    metrics_port: int = DEFAULT_METRICS_PORT
    concurrency: int = 1
    max_jobs: int = 8
    max_body_size: int = DEFAULT_MAX_BODY_SIZE
    protected: tuple[Endpoint, ...] = ()
    ca_file: Path | None = None
    poll_s: float = 2.0
    lease_s: float = 30.0
    give_up_s: float = 9.0
    heartbeat_s: float = 5.0
    journal_cap_bytes: int = DEFAULT_CAP_BYTES
