"""Shapes of retention."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megido_shared.retention import FIELDS
from megido_shared.retention.policy import MAX_BYTES, MAX_DAYS, MAX_MINUTES

type RunState = Literal["queued", "running", "done", "failed"]
Days = Annotated[int, Field(ge=0, le=MAX_DAYS)]
Bytes = Annotated[int, Field(ge=0, le=MAX_BYTES)]


class PolicyShape(BaseModel):
    """0 is no limit."""

    days: int = Field(description=FIELDS["days"].help)
    max_bytes: int = Field(description=FIELDS["max_bytes"].help)
    log_days: int = Field(description=FIELDS["log_days"].help)
    log_max_bytes: int = Field(description=FIELDS["log_max_bytes"].help)
    every_minutes: int = Field(description=FIELDS["every_minutes"].help)


class PolicyChange(BaseModel):
    """The fields that are to change."""

    model_config = ConfigDict(extra="forbid", strict=True)

    days: Days | None = None
    max_bytes: Bytes | None = None
    log_days: Days | None = None
    log_max_bytes: Bytes | None = None
    every_minutes: Annotated[int, Field(ge=0, le=MAX_MINUTES)] | None = None


class DayShape(BaseModel):
    day: str = Field(description="UTC")
    reason: str = Field(description="age or size")
    rows: dict[str, int] = Field(description="by table, those that go")
    pinned: dict[str, int] = Field(description="by table, those that stay because a flow is pinned")
    open: dict[str, int] = Field(default={}, description="by table, those that stay because a flow has not ended")
    bytes: int = Field(description="on disk, with indexes")


class LogsShape(BaseModel):
    files: int
    bytes: int
    kept_bytes: int = Field(description="what stays")
    since: str = Field(description="the oldest hour that goes, YYYYMMDDHH (UTC); empty for none")
    until: str


class BusShape(BaseModel):
    """Segments of journals without a writer that every reader is done with."""

    segments: int
    bytes: int


class ReportShape(BaseModel):
    policy: PolicyShape
    today: str
    days: list[DayShape]
    tables: dict[str, int] = Field(description="rows that go by age from tables without days")
    logs: LogsShape
    bus: BusShape
    bytes_before: int = Field(description="the database on disk")
    bytes_after: int = Field(description="of a dry run an estimate")
    over_bytes: int = Field(description="how much is still above max_bytes: the last two days stay whatever they weigh")


class Run(BaseModel):
    id: int
    state: RunState = Field(description="a failed one did what its report says")
    dry_run: bool
    requested_by: str
    requested_at: str
    finished_at: str | None
    error: str | None
    report: ReportShape | None = Field(description="what goes or went; null before it is known")


class RunList(BaseModel):
    runs: list[Run]
    limit: int
    next_cursor: int | None = Field(description="`cursor` of the next page; null on the last one")


class RunInput(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = Field(description="say what would go, and leave it")


class StoredDay(BaseModel):
    day: str
    bytes: int = Field(description="all tables of the day on disk, with indexes")


class RetentionState(BaseModel):
    policy: PolicyShape
    changed_by: str | None = Field(description="who set the policy last; null for the defaults")
    changed_at: str | None
    database_bytes: int
    days: list[StoredDay] = Field(description="the oldest first; empty days are left out")
    pinned_flows: int
    last_run: Run | None = Field(description="the last one that was not dry")


class PolicyChanged(BaseModel):
    id: int
    changes: dict[str, dict[str, int]] = Field(description="field: {old, new}")
    changed_by: str
    changed_at: str


class PolicyHistory(BaseModel):
    changes: list[PolicyChanged] = Field(description="newest first, at most 1,000")


class Pin(BaseModel):
    id: int | None = Field(description="of the request")
    flow_id: str
    url: str | None
    pinned_by: str
    pinned_at: str


class PinList(BaseModel):
    pins: list[Pin] = Field(description="newest first")
    limit: int
    next_cursor: str | None = Field(description="`cursor` of the next page; null on the last one")
