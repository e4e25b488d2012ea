"""Shapes of accounting."""

from pydantic import BaseModel, Field


class Others(BaseModel):
    """Dead letters, damaged places and expired records that ended nothing (starts, chunks), or that nobody can read."""

    dead_lettered: int
    corrupt: int
    expired: int


class Sums(BaseModel):
    """captured is the sum of the figures from stored to unexplained."""

    captured: int = Field(description="terminal records: ends of flows, WebSocket messages, errors, auth attempts")
    stored: int = Field(description="counted when they were stored; retention does not lower it")
    waiting: int = Field(description="in the journal or on the bus")
    since_heartbeat: int = Field(description="not told yet by the node, its next heartbeat will")
    dead_lettered: int = Field(description="kept with a reason; those that were put through again are stored")
    dropped: dict[str, int] = Field(description="by reason: what the node's journal could not take")
    expired: int = Field(description="removed by the bus before they were stored")
    corrupt: int = Field(description="damaged in the journal")
    unexplained: int = Field(description="none of these; below 0: counted twice")
    lost: int = Field(description="dropped, expired, corrupt and unexplained")
    balanced: bool = Field(description="nothing is unexplained")
    exact: bool = Field(
        description="nothing is inferred; false while something waits where it cannot be counted, or a heartbeat is due"
    )


class NodeAccount(Sums):
    node: str
    epoch: str = Field(description="of the node's place in its data directory; it outlives restarts")
    service: str | None = Field(description="capture or replayer; null before its first heartbeat")
    state: str | None = Field(description="what it said last")
    heartbeat_age: float | None = Field(description="seconds since what it said last: dropped may be as old")
    others: Others


class Posted(BaseModel):
    """What was posted to the API has no sequence numbers: it is in Postgres from the moment of the answer."""

    waiting: int = Field(description="records in the outbox, those of forwarders over HTTP too")


class Accounting(BaseModel):
    balanced: bool = Field(description="nothing is unexplained in total")
    exact: bool = Field(description="so is everything in it; true once all is drained and idle")
    total: Sums
    nodes: list[NodeAccount] = Field(description="by name")
    unattributed: Others = Field(description="of no known node; explains what is missing in the total only")
    posted: Posted
    bus: str = Field(description="why the bus could not be asked, else empty")
