"""What a run removes: the plan of a dry run, and the audit of one that did it. The same shape, in `retention_runs`."""

from typing import Any

import msgspec

from megido_shared.retention.policy import NOTHING, Policy


class Day(msgspec.Struct):
    """A day (UTC, `2026-02-13`) whose rows go. `rows`, `pinned` and `open` by table: those that go, those that stay
    because a flow is pinned, those that stay because it has not ended. `bytes` on disk, with indexes; where rows stay,
    their part of it."""

    day: str
    reason: str
    rows: dict[str, int]
    pinned: dict[str, int]
    bytes: int
    open: dict[str, int] = {}


class Logs(msgspec.Struct):
    """Log files. `kept_bytes` is what stays; `since` and `until` are the oldest and newest hour that go, YYYYMMDDHH."""

    files: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    since: str = ""
    until: str = ""


class Bus(msgspec.Struct):
    """Segments of journals without a writer that every reader is done with; a live writer removes its own."""

    segments: int = 0
    bytes: int = 0


class Report(msgspec.Struct):
    """`tables`: rows that go by age from tables that have no days. `bytes_before` and `bytes_after` are the database on
    disk, of a dry run an estimate. `over_bytes`: how much it is still above `max_bytes` because today and yesterday
    stay whatever they weigh. `errors`: what stood in the way of a part; the others were done."""

    policy: Policy = NOTHING
    today: str = ""
    days: list[Day] = []
    tables: dict[str, int] = {}
    logs: Logs = msgspec.field(default_factory=Logs)
    bus: Bus = msgspec.field(default_factory=Bus)
    bytes_before: int = 0
    bytes_after: int = 0
    over_bytes: int = 0
    errors: list[str] = []

    @property
    def removes(self) -> bool:
        """Whether anything goes."""
        return bool(self.days or any(self.tables.values()) or self.logs.files or self.bus.segments)


def to_json(report: Report | Day) -> Any:
    return msgspec.to_builtins(report)


def from_json(document: Any) -> Report:
    return msgspec.convert(document, Report)
