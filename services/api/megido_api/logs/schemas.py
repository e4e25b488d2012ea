"""Shapes of the log files."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

type LogType = Literal["requests", "responses", "websockets", "errors", "auth"]


class LogList(BaseModel):
    logs: list[dict[str, Any]] = Field(description="entries as the files hold them, newest first")
    type: LogType
    truncated: bool = Field(description="32 MB were read, and older entries were left out")
    limit: int
    directory: str = Field(description="where the files are, on the API's machine")
    readable: bool = Field(description="false when there is no such directory: ingest writes elsewhere, or nothing yet")


class GeneralLog(BaseModel):
    lines: list[str] = Field(description="of proxy_general.log, newest first")
    limit: int
    directory: str
    readable: bool


class CleanupInput(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    days_to_keep: int = Field(default=30, ge=0, le=36_500, description="days (UTC) that are kept beside today")
    dry_run: bool = Field(default=False, description="say what would go, and leave it")


class Cleaned(BaseModel):
    removed: int = Field(description="entries' files; of a dry run, those that would go")
    bytes: int = Field(description="on disk")
    dry_run: bool
    hours: list[str] = Field(description="YYYYMMDDHH (UTC), the oldest first")
    directory: str
