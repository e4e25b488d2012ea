"""Shapes of payload rules."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from megido_api.fields import StoredText

InjectionType = Literal["header", "param", "cookie", "body"]
_App = Annotated[StoredText, StringConstraints(min_length=1, max_length=200)]
_RuleName = Annotated[StoredText, StringConstraints(min_length=1, max_length=255)]
_Pattern = Annotated[StoredText, StringConstraints(max_length=4096)]


class Rule(BaseModel):
    id: int
    name: str
    target_url_pattern: str = Field(description="RE2, found anywhere in the URL")
    injection_type: InjectionType
    injection_point: str = Field(description="the name of the header, parameter, cookie or body field")
    payload_content: str
    active: bool
    target_apps: list[str] = Field(description="source_app values; empty means every application")
    created_by: int | None
    created_by_username: str | None
    created_at: str
    updated_at: str
    hits: int
    last_hit_at: str | None
    errors: int = Field(description="how often it could not be applied, counted by nodes since their starts")
    skipped: int = Field(description="how often a body was too large for it, or a URL too long, counted likewise")
    etag: str = Field(description="for If-Match: a change is refused (412) when somebody else made one meanwhile")


class ActiveRules(BaseModel):
    success: bool
    count: int
    rules: list[Rule]


class RuleInput(BaseModel):
    name: _RuleName
    target_url_pattern: _Pattern
    injection_type: InjectionType
    injection_point: StoredText
    payload_content: StoredText
    active: bool = True
    target_apps: list[_App] = Field(default=[], max_length=1000)


class RulePatch(BaseModel):
    """Only the given fields change."""

    name: _RuleName | None = None
    target_url_pattern: _Pattern | None = None
    injection_type: InjectionType | None = None
    injection_point: StoredText | None = None
    payload_content: StoredText | None = None
    active: bool | None = None
    target_apps: list[_App] | None = Field(default=None, max_length=1000)
