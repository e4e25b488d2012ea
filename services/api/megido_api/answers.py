"""Shapes that several resources answer with."""

from pydantic import BaseModel, Field


class Created(BaseModel):
    id: int = Field(description="the integer id that paths and lists show")
