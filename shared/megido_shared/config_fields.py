"""The fields of the configuration: default, meaning and bounds, in one table for proxies, API and command line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from megido_shared.config import ProxySettings
from megido_shared.hostpatterns import HostPatterns
from megido_shared.networks import parse_networks
from megido_shared.settings import DEFAULT_LOG_DIR, DEFAULT_MAX_BODY_SIZE

MAX_SECONDS = 86_400
MAX_BODY_SIZE = 1 << 40
MAX_CLIENTS = 1 << 20
MAX_MESSAGE = 1 << 30
DEFAULT_MAX_CLIENTS = 2000
"""Far above what browsers and scanners of a team open, below what memory and 4,096 open files hold (two each)."""
DEFAULT_MAX_MESSAGE = 1 << 20
MAX_TEXT = 32_768
MAX_SECRET = 1_024
"""A header with a much longer one would be refused."""

type Kind = Literal["flag", "number", "text", "networks", "names", "secret", "folder"]


@dataclass(frozen=True, slots=True)
class Field:
    """`low` and `high` bound a number. A secret's default is ""; its hash is what is kept (`SECRETS`)."""

    kind: Kind
    default: bool | int | str
    help: str
    low: int = 0
    high: int = 0


def _seconds(default: int, text: str, low: int = 0) -> Field:
    return Field("number", default, text, low, MAX_SECONDS)


FIELDS: dict[str, Field] = {
    "auth_enabled": Field(
        "flag", False, "Require credentials of every client of the proxy. Needs a token or password."
    ),
    "auth_username": Field("text", "", "The user name of Basic credentials; empty: any."),
    "auth_password": Field("secret", "", "The password of Basic credentials."),
    "auth_token": Field(
        "secret", "", "The token: as Bearer token, or as password of Basic credentials with any user name."
    ),
    "ip_whitelist": Field(
        "networks", "", "Addresses and networks (CIDR), comma-separated, that may use the proxy; empty: all."
    ),
    "ip_blacklist": Field("networks", "", "Addresses and networks that may not; wins over ip_whitelist."),
    "logging_enabled": Field("flag", True, "Record traffic. Off: it passes through and nothing is kept."),
    "log_request_body": Field("flag", True, "Store request bodies. Off: only their size and hash."),
    "log_response_body": Field("flag", True, "Store response bodies. Off: only their size and hash."),
    "log_directory": Field(
        "folder",
        DEFAULT_LOG_DIR,
        f"Where JSON logs go: a folder below ingest's log root; {DEFAULT_LOG_DIR} is that root itself.",
    ),
    "connection_timeout": _seconds(
        30, "Seconds that name resolution and connect, and then the TLS handshake, may take.", 1
    ),
    "transfer_timeout": _seconds(
        0, "Seconds that a server may send nothing while a client waits for it; 0 is no limit of ours."
    ),
    "max_concurrent_clients": Field(
        "number",
        DEFAULT_MAX_CLIENTS,
        "Clients served at a time, idle ones not counted; 0 is no limit. More get 503.",
        0,
        MAX_CLIENTS,
    ),
    "cache_enabled": Field("flag", False, "Serve static assets from a cache by the rules of RFC 9111."),
    "websocket_enabled": Field("flag", True, "Record WebSocket messages."),
    "max_body_size": Field(
        "number",
        DEFAULT_MAX_BODY_SIZE,
        "Bytes of a body that are stored. What is forwarded is never cut.",
        0,
        MAX_BODY_SIZE,
    ),
    "websocket_max_message": Field(
        "number",
        DEFAULT_MAX_MESSAGE,
        "Bytes that a WebSocket message may have, decompressed; a larger one is closed with 1009.",
        125,
        MAX_MESSAGE,
    ),
    "max_clients_per_address": Field(
        "number", 0, "The same for the clients of one address; 0 is no limit.", 0, MAX_CLIENTS
    ),
    "header_timeout": _seconds(30, "Seconds in which the head of a request must have come; 0 is no limit."),
    "passthrough_hosts": Field(
        "names",
        "",
        "Hosts, comma-separated, whose TLS is tunnelled untouched (they pin their certificate): names, *.name, "
        "addresses, networks; :port may follow.",
    ),
    "blocked_destinations": Field(
        "names",
        "",
        "Hosts that nobody reaches through the proxy, comma-separated: names, *.name, addresses, networks; :port may "
        "follow.",
    ),
}
"""As the API shows them. `auth_enabled` is the option `auth_required` of a proxy."""

SECRETS = {"auth_password": "auth_password_hash", "auth_token": "auth_token_hash"}
"""The field that is written, and the one that keeps its hash."""


class Invalid(ValueError):
    """A value that no proxy could apply; `field` is its name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def check_value(name: str, value: bool | int | str) -> None:
    """Raises Invalid on a value of the right type that `name` cannot have."""
    field = FIELDS[name]
    if isinstance(value, str):
        _check_text(name, field.kind, value)
    elif field.kind == "number" and not field.low <= value <= field.high:
        raise Invalid(name, f"must be between {field.low} and {field.high}, not {value}")


def _check_text(name: str, kind: Kind, value: str) -> None:
    longest = MAX_SECRET if kind == "secret" else MAX_TEXT
    if len(value) > longest:
        raise Invalid(name, f"must not be longer than {longest} characters")
    if name == "auth_username" and ":" in value:
        raise Invalid(name, "must not contain ':', which ends the user name of Basic credentials (RFC 7617)")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise Invalid(name, "must not contain control characters")
    match kind:
        case "networks":
            try:
                parse_networks(value)
            except ValueError as error:
                raise Invalid(name, str(error)) from None
        case "names":
            try:
                HostPatterns(value)
            except ValueError as error:
                raise Invalid(name, str(error)) from None
        case "folder" if ".." in value.split("/"):
            raise Invalid(name, "must not contain '..'")
        case "folder" if value.startswith(("/", "~")):
            raise Invalid(name, "must be a folder below ingest's log root, not an absolute path")


def merged(layers: Iterable[ProxySettings]) -> ProxySettings:
    """One over the other, field by field: the last layer that says something about a field wins."""
    said: dict[str, Any] = {}
    for layer in layers:
        said |= given(layer)
    return ProxySettings(**said)


def given(settings: ProxySettings) -> dict[str, Any]:
    """What these settings say something about."""
    return {name: value for name, value in msgspec.structs.asdict(settings).items() if value is not None}


def check_together(settings: ProxySettings) -> None:
    """Raises Invalid on merged settings that contradict one another."""
    if settings.auth_enabled and not (settings.auth_password_hash or settings.auth_token_hash):
        raise Invalid("auth_enabled", "needs credentials to compare with: set auth_password or auth_token too")
