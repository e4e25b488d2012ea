"""Shapes of dead letters."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megido_api.fields import StoredText

type LetterState = Literal["new", "queued", "redriven", "discarded"]


class DeadLetter(BaseModel):
    id: int
    topic: str
    partition: int
    offset: int
    source_id: str = Field(description="the Kafka cluster, or the local producer's epoch")
    event_type: str = Field(description="as far as it could be read")
    reason: str
    size: int = Field(description="bytes of the record")
    state: LetterState = Field(
        description="new; queued: on its way through ingest again; redriven: stored after all; discarded"
    )
    attempts: int = Field(description="how often it was put through ingest again")
    created_at: str
    changed_by: str | None = Field(description="who put it through again, or discarded it")
    changed_at: str | None


class DeadLetterDetail(DeadLetter):
    key_base64: str
    value_base64: str = Field(description="the record, byte for byte")
    decoded: Any = Field(
        description="the record where it is MessagePack, shortened: bytes as {text} or {hex}; null where it is not"
    )


class DeadLetterList(BaseModel):
    dead_letters: list[DeadLetter]
    total: int
    limit: int
    total_is_exact: bool = Field(description="false when there are more than `total`")
    next_cursor: int | None = Field(description="`cursor` of the next page; null on the last one")


class RedriveInput(BaseModel):
    """Which dead letters; all filters apply. Without any: all that are new."""

    model_config = ConfigDict(extra="forbid")

    topic: StoredText | None = None
    reason: StoredText | None = Field(default=None, description="substring")
    state: Literal["new", "queued", "discarded"] = "new"
    after: int = Field(default=0, ge=0, lt=2**63, description="only ids above it; `last_id` of the call before")


class Redriven(BaseModel):
    queued: int
    more: bool = Field(description="as many as one call takes: call again, after `last_id`")
    last_id: int | None
    too_large: int = Field(description="those left out because no bus would take them")
