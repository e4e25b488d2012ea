"""Shapes of the flows' answers and posts (the founding document's fields, and ours beside them)."""

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field, model_validator

from megido_api.fields import UPPER, BodyEncoding, BodyText, Headers, Name, Size, Text, TimeUs, body_bytes

State = Literal["started", "interrupted", "failed", "completed"]


class ListedRequest(BaseModel):
    id: int
    method: str
    url: str
    host: str
    protocol: str
    source_ip: str
    timestamp: str
    request_size: int
    is_replay: bool
    status_code: int | None
    response_time: float | None = Field(description="ms")
    flow_id: UUID
    state: State
    source_app: str
    content_type: str | None
    response_size: int | None
    cached: bool
    error_type: str | None


class RequestList(BaseModel):
    requests: list[ListedRequest]
    total: int
    limit: int
    offset: int
    total_is_exact: bool = Field(description="false when `total` is an estimate, or there are more")
    next_cursor: UUID | None = Field(description="`cursor` of the next page; null on the last one")


class BodyFields(BaseModel):
    body: str = Field(description="text; lossy where `body_encoding` is base64")
    body_encoding: Literal["text", "base64"]
    body_base64: str | None = Field(default=None, description="the stored bytes, where `body` cannot say them")
    body_size: int = Field(description="bytes that crossed the wire")
    decoded_from: str | None = Field(description="the content coding that was undone for `body`")
    truncated: bool = Field(description="less than the whole body is stored")
    sha256: str | None = Field(description="of the whole body as it crossed the wire; null when unknown")


class HeaderFields(BaseModel):
    headers: dict[str, str] = Field(description="the last value by name")
    raw_headers: list[tuple[str, str]] = Field(description="in order, with case and duplicates")
    headers_encoding: Literal["utf-8", "latin-1"] = Field(description="makes `raw_headers` the bytes on the wire")


class ResponseDetail(BodyFields, HeaderFields):
    status_code: int
    response_time: float | None = Field(description="ms")
    response_size: int
    cached: bool
    error_message: str | None
    reason: str
    http_version: str


class FlowError(BaseModel):
    error_type: str
    error_message: str
    stack_trace: str


class RequestDetail(BodyFields, HeaderFields):
    id: int
    method: str
    url: str
    timestamp: str
    host: str
    port: int
    source_ip: str
    protocol: str
    request_size: int
    user_agent: str
    is_replay: bool
    original_request_id: int | None
    response: ResponseDetail | None = Field(default=None, description="missing without one")
    flow_id: UUID
    state: State
    source_app: str
    http_version: str
    replay_job_id: UUID | None
    error: FlowError | None


class _PostedBody(BaseModel):
    headers: Headers = Field(default=None, description="an object of values by name, or its JSON text")
    body: BodyText = None
    body_encoding: BodyEncoding = "text"

    @model_validator(mode="after")
    def _decode(self) -> Any:
        try:
            self.body = body_bytes(self.body, self.body_encoding)
        except ValueError as error:
            raise ValueError(f"body {error}") from error
        self.headers = self.headers or []
        return self


class PostedRequest(_PostedBody):
    """A request that another capture tool saw. `request_size` may exceed the posted body, which is then cut."""

    url: Name
    method: Name
    host: Name
    port: int = Field(ge=1, le=65535)
    source_ip: Text | None = ""
    protocol: Annotated[Literal["HTTP", "HTTPS", "WS", "WSS"], UPPER] = "HTTP"
    request_size: Size | None = None
    user_agent: Text | None = ""
    source_app: Text | None = ""
    timestamp: TimeUs = Field(default=None, description="when it was seen; now when missing")


class PostedResponse(_PostedBody):
    """The response to a posted request."""

    request: Annotated[int, Field(ge=0, lt=2**63)] | UUID = Field(
        description="the id that the request's post answered with, or its flow_id"
    )
    status_code: int = Field(ge=0, le=999)
    response_time: float | None = Field(
        default=None, ge=0, le=3.15e10, allow_inf_nan=False, description="ms; a year at most"
    )
    response_size: Size | None = None
    cached: bool = False
    error_message: Text | None = ""
