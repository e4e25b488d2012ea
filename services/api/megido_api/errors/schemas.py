"""Shapes of errors."""

from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, Field

from megido_api.fields import UPPER, Name, Text, TimeUs
from megido_shared.events import ErrorType


class ListedError(BaseModel):
    id: int
    error_type: ErrorType
    error_message: str
    url: str
    source_ip: str
    timestamp: str
    request_id: int | None = Field(description="the request that failed, if there is one")
    error_id: UUID
    stack_trace: str


class ErrorList(BaseModel):
    errors: list[ListedError]
    total: int
    limit: int
    total_is_exact: bool = Field(description="false when there are more than `total`")
    next_cursor: UUID | None = Field(description="`cursor` of the next page; null on the last one")


class PostedError(BaseModel):
    """An error that another capture tool met."""

    error_message: Name
    error_type: Annotated[ErrorType, UPPER] = ErrorType.OTHER
    stack_trace: Text | None = ""
    url: Text | None = ""
    source_ip: Text | None = ""
    timestamp: TimeUs = None
