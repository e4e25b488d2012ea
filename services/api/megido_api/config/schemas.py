"""Shapes of the configuration. The fields are those of `megido_shared.config_fields`."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, create_model

from megido_api.fields import StoredText
from megido_shared.config_fields import FIELDS, SECRETS
from megido_shared.config_fields import Field as Setting

_TYPES: dict[str, Any] = {"flag": bool, "number": int}


def _whole(value: Any) -> Any:
    """Of text that decides on access nothing is replaced."""
    try:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le") if isinstance(value, str) else value
    except UnicodeDecodeError:
        raise ValueError("must not contain half a surrogate pair") from None


_SettingText = Annotated[StoredText, BeforeValidator(_whole)]


class FieldHelp(BaseModel):
    type: str = Field(description="flag, number, text, networks, names, secret or folder")
    default: bool | int | str
    help: str
    minimum: int | None = None
    maximum: int | None = None


class Override(BaseModel):
    node: str
    value: str = Field(description="what the node's start decided; of a secret only that it is set")


class _Configuration(BaseModel):
    scope: str = Field(description="global, app:<source_app> or node:<node>")
    version: int = Field(description="of the last change of this scope; 0: never changed. Also in ETag")
    updated_at: str | None


class _More(BaseModel):
    own: list[str] = Field(description="fields that this scope itself says something about; the rest is from below it")
    scopes: list[str] = Field(description="every scope that says something")
    overridden: dict[str, list[Override]] = Field(
        description="fields that a flag, --set or variable decided at the start of a running node"
    )
    fields: dict[str, FieldHelp]


def _answered(name: str, setting: Setting) -> dict[str, Any]:
    if name in SECRETS:
        return {f"{name}_set": (bool, Field(description=f"whether there is one. {setting.help}"))}
    return {name: (_TYPES.get(setting.kind, str), Field(description=setting.help))}


def _accepted(setting: Setting) -> Any:
    plain: Any = Annotated[_TYPES.get(setting.kind, _SettingText), Field(strict=setting.kind in _TYPES)]
    return (plain | None, Field(default=None, description=f"{setting.help} null: as if it had never been set."))


Configuration: type[BaseModel] = create_model(
    "Configuration",
    __base__=(_More, _Configuration),
    **{shown: entry for name, setting in FIELDS.items() for shown, entry in _answered(name, setting).items()},
)
"""What is in force in a scope. Secrets are never shown."""

ConfigurationInput: type[BaseModel] = create_model(
    "ConfigurationInput",
    __config__=ConfigDict(extra="forbid"),
    __doc__="Fields that are left out stay as they are (PATCH), or are no longer set (PUT; but for secrets).",
    version=(
        int | None,
        Field(default=None, description="the version that this is a change of; 409 when it is not the current one"),
    ),
    **{name: _accepted(setting) for name, setting in FIELDS.items()},
)


class PassthroughHost(BaseModel):
    host: Annotated[StoredText, StringConstraints(min_length=1, max_length=255, strip_whitespace=True)]


class Change(BaseModel):
    version: int
    scope: str
    changed_by: str
    changed_at: str
    changes: dict[str, Any] = Field(description="by field what it was and what it is, null: not set")


class History(BaseModel):
    changes: list[Change] = Field(description="newest first")
    total: int


class ActiveSnapshots(BaseModel):
    snapshots: list[dict[str, Any]] = Field(description="by scope what a proxy applies, as on the bus")


def help_of_fields() -> dict[str, FieldHelp]:
    return {
        name: FieldHelp(
            type=setting.kind,
            default=setting.default,
            help=setting.help,
            minimum=setting.low if setting.kind == "number" else None,
            maximum=setting.high if setting.kind == "number" else None,
        )
        for name, setting in FIELDS.items()
    }
