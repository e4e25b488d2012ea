"""Shape of the statistics."""

from typing import Literal

from pydantic import BaseModel, Field


class MethodCount(BaseModel):
    method: str
    count: int


class ProtocolCount(BaseModel):
    protocol: str
    count: int


class StatusCount(BaseModel):
    status_code: int
    count: int


class ErrorCount(BaseModel):
    error_type: str
    count: int


class HostCount(BaseModel):
    host: str
    count: int


class Latency(BaseModel):
    """ms, from a histogram: within 19 % of the exact ones."""

    p50: float
    p90: float
    p95: float
    p99: float


class Bucket(BaseModel):
    time: str = Field(description="its beginning")
    requests: int
    errors: int
    avg_response_time: float | None = Field(description="ms")
    latency: Latency | None


class TextIndex(BaseModel):
    """How far behind searches in headers and bodies are. Searches in URLs miss nothing."""

    lag_batches: int
    lag_seconds: float


class Stats(BaseModel):
    total_requests: int
    total_websocket_messages: int
    total_errors: int
    requests_by_method: list[MethodCount]
    requests_by_protocol: list[ProtocolCount]
    avg_response_time: float = Field(description="ms; 0 while there is no response")
    recent_auth_failures: int = Field(description="in the last 24 hours")
    since: str | None = Field(description="what the figures below, and with `from` or `to` those above, are of")
    until: str | None
    requests_per_second: float
    errors_per_second: float
    requests_by_status: list[StatusCount]
    errors_by_type: list[ErrorCount]
    top_hosts: list[HostCount]
    request_bytes: int
    response_bytes: int
    latency: Latency | None
    bucket: Literal["minute", "hour", "day"] | None = Field(
        description="of `series`: wider than asked for where the range begins before what is kept of the finer ones"
    )
    series: list[Bucket]
    text_index: TextIndex
