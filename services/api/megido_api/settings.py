"""The API's settings. Read once, in `__main__`, and passed on from there."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from megido_shared.db.connect import parse_url
from megido_shared.errors import ConfigurationError
from megido_shared.settings import DEFAULT_LOG_DIR, Common

MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """`token` is the value of MEGIDO_API_TOKEN; `allow_hosts` are names besides the loopback ones and `host`
    that a request's Host header may hold ("*" allows any)."""

    common: Common
    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: tuple[str, ...] = ()
    token: str = ""
    statement_timeout_s: float = 5.0
    connect_timeout_s: float = 1.2
    max_body_bytes: int = 32 << 20
    max_connections: int = 512
    log_dir: Path = Path(DEFAULT_LOG_DIR)
    """The root of the log files, which ingest writes."""

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the API: then local `curl` needs no token."""
        return is_loopback(self.host)

    @property
    def token_required(self) -> bool:
        """Whether every route but the probes asks for the bearer token."""
        return not self.on_loopback

    def check(self) -> None:
        """Raises ConfigurationError, in one line, on settings that cannot work or would be unsafe."""
        if not self.common.database_url:
            raise ConfigurationError("no database: give --database-url or set MEGIDO_DATABASE_URL")
        parse_url(self.common.database_url)
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"--port must be between 0 and 65535, not {self.port}")
        if self.token_required and not self.token:
            raise ConfigurationError(
                f"listening on {self.host} makes the API reachable from other machines: set MEGIDO_API_TOKEN, "
                "or listen on 127.0.0.1"
            )
        if self.token and len(self.token) < MIN_TOKEN_LENGTH:
            raise ConfigurationError(f"MEGIDO_API_TOKEN is too short: {MIN_TOKEN_LENGTH} characters at least")


def is_loopback(host: str) -> bool:
    """Of a bind address; a name other than localhost counts as reachable from elsewhere."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
