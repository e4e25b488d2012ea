"""Shapes of WebSocket messages."""

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, Field, StringConstraints

from megido_api.fields import UPPER, BodyText, Name, Size, Text, TimeUs

Direction = Literal["SEND", "RECEIVE"]
MessageType = Literal["TEXT", "BINARY", "PING", "PONG", "CLOSE"]


class Message(BaseModel):
    id: int
    connection_id: str
    url: str
    direction: Direction
    message_type: MessageType
    payload: str = Field(description="the first 200 characters, then `...`; hex unless it is text")
    payload_size: int
    timestamp: str
    source_ip: str
    message_id: UUID
    flow_id: UUID
    sequence: int
    truncated: bool
    close_code: int | None
    close_reason: str | None


class MessageList(BaseModel):
    messages: list[Message]
    total: int
    limit: int
    total_is_exact: bool = Field(description="false when there are more than `total`")
    next_cursor: UUID | None = Field(description="`cursor` of the next page; null on the last one")


class PostedMessage(BaseModel):
    """A message that another capture tool saw. A BINARY payload is hex."""

    connection_id: Annotated[Name, StringConstraints(max_length=255)]
    url: Name
    direction: Annotated[Direction, UPPER]
    message_type: Annotated[MessageType, UPPER]
    payload: BodyText = Field(description="text; hex of a BINARY one")
    payload_size: Size | None = None
    source_ip: Text | None = ""
    timestamp: TimeUs = None

    def payload_bytes(self) -> bytes:
        text: Any = self.payload or ""
        if self.message_type == "BINARY":
            try:
                return bytes.fromhex(text)
            except ValueError:
                pass  # an older tool's lossy text
        return str(text).encode("utf-8", "surrogatepass")
