"""The settings of a capture node: checked once, passed on, never read at import."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from megido_shared.config_fields import (
    DEFAULT_MAX_CLIENTS,
    DEFAULT_MAX_MESSAGE,
    FIELDS,
    MAX_SECONDS,
    SECRETS,
    Invalid,
    check_value,
)
from megido_shared.errors import ConfigurationError
from megido_shared.settings import (
    DEFAULT_API_URL,
    DEFAULT_JOURNAL_CAP,
    DEFAULT_MAX_BODY_SIZE,
    MIN_JOURNAL_CAP,
    parse_size,
)

JOURNAL_POLICIES = ("drop_newest", "block")


CONFIGURED = tuple(name for name in FIELDS if name not in SECRETS and name != "log_directory")
"""Fields of the configuration that are options of a proxy; JSON logs are ingest's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSettings:
    """The founding document's options (the first eight), and ours.

    `max_body_size` in bytes caps what is stored, never what is forwarded. `connection_timeout` in seconds bounds
    name resolution and connect to an upstream server, and again the TLS handshake with it; `transfer_timeout` bounds
    how long an upstream may send nothing while we wait for it (0: only mitmproxy's own `tcp_timeout` does).
    A WebSocket message over `websocket_max_message` bytes, decompressed, ends its connection with 1009.
    `max_concurrent_clients` and `max_clients_per_address` (0: no limit) bound the clients that are served at a time,
    `header_timeout` in seconds (0: none) how long a head may take to come.
    `cache_ttl` in seconds is the age after which the configuration is read again, and the node says that it is stale.
    `journal_cap` (like 512MiB) bounds what is on disk and not stored or shipped yet. At the cap `journal_policy`
    drop_newest records no more; block lets new requests wait for room, each `journal_wait` seconds at most.
    The lists are comma-separated. `auth_username` "" is any user name; the hashes come from the live configuration.
    """

    api_url: str = DEFAULT_API_URL
    source_app: str = "browser"
    auth_required: bool = False
    auth_token: str = field(default="", repr=False)
    max_body_size: int = DEFAULT_MAX_BODY_SIZE
    websocket_enabled: bool = True
    websocket_max_message: int = DEFAULT_MAX_MESSAGE
    connection_timeout: int = 30
    cache_ttl: int = 60
    transfer_timeout: int = 0
    max_concurrent_clients: int = DEFAULT_MAX_CLIENTS
    max_clients_per_address: int = 0
    header_timeout: int = 30
    allow_open_proxy: bool = False
    auth_username: str = ""
    auth_password: str = field(default="", repr=False)
    auth_password_hash: str = field(default="", repr=False)
    auth_token_hash: str = field(default="", repr=False)
    ip_whitelist: str = ""
    ip_blacklist: str = ""
    logging_enabled: bool = True
    log_request_body: bool = True
    log_response_body: bool = True
    cache_enabled: bool = False
    passthrough_hosts: str = ""
    blocked_destinations: str = ""
    journal_cap: str = DEFAULT_JOURNAL_CAP
    journal_policy: str = "drop_newest"
    journal_wait: int = 30

    def checked(self) -> "CaptureSettings":
        """Itself. Raises ConfigurationError, naming the option and what it takes."""
        url = urlsplit(self.api_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigurationError(f"api_url is {self.api_url!r}; it must look like http://host:8000")
        if self.auth_required and not self.has_credentials:
            raise ConfigurationError(
                "auth_required is set but there is nothing to compare with; set auth_token (PROXY_AUTH_TOKEN) or "
                "auth_password (PROXY_AUTH_PASSWORD)"
            )
        for name in CONFIGURED:
            option = option_of(name)
            try:
                check_value(name, getattr(self, option))
            except Invalid as error:
                raise ConfigurationError(f"{option}: {error.problem}") from error
        _check_range("cache_ttl", self.cache_ttl, 1, MAX_SECONDS)
        _check_range("journal_wait", self.journal_wait, 0, MAX_SECONDS)
        parse_size("journal_cap", self.journal_cap, MIN_JOURNAL_CAP)
        if self.journal_policy not in JOURNAL_POLICIES:
            raise ConfigurationError(
                f"journal_policy is {self.journal_policy!r}; it must be {' or '.join(JOURNAL_POLICIES)}"
            )
        return self

    @property
    def journal_cap_bytes(self) -> int:
        return parse_size("journal_cap", self.journal_cap, MIN_JOURNAL_CAP)

    @property
    def has_credentials(self) -> bool:
        return bool(self.auth_token or self.auth_password or self.auth_password_hash or self.auth_token_hash)


_FROM_CONFIGURATION_ONLY = set(SECRETS.values())
NAMES = tuple(item.name for item in fields(CaptureSettings) if item.name not in _FROM_CONFIGURATION_ONLY)
"""What can be set at the start, as flag, `--set` or variable."""


def option_of(field_name: str) -> str:
    """The option that a field of the configuration leads to."""
    return "auth_required" if field_name == "auth_enabled" else field_name


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigurationError(f"{name} is {value}; it must be between {low} and {high}")


def defaults_from_env(env: Mapping[str, str]) -> dict[str, Any]:
    """Values of PROXY_API_URL, PROXY_AUTH_TOKEN, PROXY_AUTH_PASSWORD and PROXY_MAX_BODY_SIZE by option name; empty
    ones count as unset.

    Raises ConfigurationError when a number is none.
    """
    found: dict[str, Any] = {}
    if url := env.get("PROXY_API_URL"):
        found["api_url"] = url
    if token := env.get("PROXY_AUTH_TOKEN"):
        found["auth_token"] = token
    if password := env.get("PROXY_AUTH_PASSWORD"):
        found["auth_password"] = password
    if size := env.get("PROXY_MAX_BODY_SIZE"):
        try:
            found["max_body_size"] = int(size)
        except ValueError:
            raise ConfigurationError(f"PROXY_MAX_BODY_SIZE is {size!r}; it must be a number of bytes") from None
    return found
