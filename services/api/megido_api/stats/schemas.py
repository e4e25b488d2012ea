"""Shape of the statistics."""

from pydantic import BaseModel, Field


class MethodCount(BaseModel):
    method: str
    count: int


class ProtocolCount(BaseModel):
    protocol: str
    count: int


class Stats(BaseModel):
    total_requests: int
    total_websocket_messages: int
    total_errors: int
    requests_by_method: list[MethodCount]
    requests_by_protocol: list[ProtocolCount]
    avg_response_time: float = Field(description="ms; 0 while there is no response")
    recent_auth_failures: int = Field(description="in the last 24 hours")
