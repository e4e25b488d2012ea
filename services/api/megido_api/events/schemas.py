"""Shape of the answer to a batch of events."""

from pydantic import BaseModel


class Accepted(BaseModel):
    accepted: int
