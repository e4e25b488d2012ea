"""Shapes of nodes."""

from typing import Literal

from pydantic import BaseModel, Field


class Node(BaseModel):
    node: str
    epoch: str = Field(description="of the node's place in its data directory; it outlives restarts")
    service: str = Field(description="capture or replayer")
    state: Literal["started", "running", "stopping"] = Field(description="what it said last")
    alive: bool = Field(description="it did not stop, and was heard of in the last 20 seconds")
    version: str
    listen: str
    source_app: str
    config_version: int = Field(description="the configuration that it applies")
    config_expected: int | None = Field(description="the one that it should apply; null for what needs none")
    config_stale: bool = Field(description="it could not read the configuration for longer than cache_ttl")
    config_error: str = Field(description="why it does not apply a newer one")
    pinned: dict[str, str] = Field(description="what its start decided over the configuration")
    counters: dict[str, int] = Field(description="since its start")
    captured: int = Field(description="terminal records since the epoch began")
    seen_at: str
    started_at: str | None


class Nodes(BaseModel):
    nodes: list[Node] = Field(description="last heard of first")
    total: int
