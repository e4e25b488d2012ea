"""Shapes of replays."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megido_api.fields import StoredText


def _check_target(url: str) -> str:
    if not url:
        return url
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise ValueError(f"is no URL ({error})") from error
    if not usable or any(ord(character) <= 32 for character in url):
        raise ValueError("must be an http:// or https:// URL with a host")
    return url


class ReplayRequest(BaseModel):
    """A name that is not known is refused: a mistyped target must not send to the original."""

    model_config = ConfigDict(extra="forbid")

    target_url: Annotated[StoredText, AfterValidator(_check_target)] | None = Field(
        default=None,
        description="another scheme, host and port; another path too when it has one",
        examples=["http://localhost:3000/test"],
    )
    verify_tls: bool = True
    timeout: float = Field(
        default=30.0, ge=0.1, le=600, allow_inf_nan=False, description="seconds, of the send as a whole"
    )
    wait: bool = Field(default=True, description="answer with the result; false answers 202 at once")


class ReplayedRequest(BaseModel):
    url: str
    original_url: str
    method: str
    headers: dict[str, str]
    raw_headers: list[tuple[str, str]]
    body: str


class ReplayedResponse(BaseModel):
    success: bool
    status_code: int | None = Field(default=None, description="with success")
    headers: dict[str, str] | None = Field(default=None, description="with success")
    raw_headers: list[tuple[str, str]] | None = Field(default=None, description="with success")
    body: str | None = Field(default=None, description="with success")
    response_time: float | None = Field(default=None, description="ms; with success")
    error: str | None = Field(default=None, description="without success")


class ReplayResult(BaseModel):
    success: bool
    request: ReplayedRequest
    response: ReplayedResponse
    timestamp: str
    error_message: str | None
    replayed_request_id: int | None
    deviations: list[str] = Field(description="how the request that was sent differs from the original, and why")
    job_id: UUID
    diff_url: str | None = Field(description="where the answers are compared; null until they can be")


class ReplayAccepted(BaseModel):
    job_id: UUID
    state: str
    job_url: str


ItemState = Literal["queued", "claimed", "sent", "succeeded", "failed", "timed_out", "skipped", "cancelled", "unknown"]


class Item(BaseModel):
    position: int
    state: ItemState
    attempt: int
    original_request_id: int
    original_flow_id: UUID
    replayed_request_id: int | None = Field(description="once the result is stored")
    result_flow_id: UUID | None
    status_code: int | None
    error: str | None
    deviations: list[str] = Field(description="how the request that was sent differs from the original, and why")
    updated_at: str


class Job(BaseModel):
    job_id: UUID
    state: Literal["queued", "running", "paused", "done", "cancelled", "failed"]
    options: dict[str, Any]
    created_by: str
    created_at: str
    updated_at: str
    total_items: int
    items_by_state: dict[str, int]
    items: list[Item] = Field(description="by position, from `offset`, up to `limit`")
