"""What goes in and comes out of the transport: a request as bytes, an answer as bytes, or a typed error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from megido_shared.errors import MegidoError
from megido_shared.events import NO_PEER, NO_TIMING, ErrorType, Peer, Timing

type Headers = Sequence[tuple[bytes, bytes]]

SAFE_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))
"""RFC 9110 9.2.1: sending one of these twice asks for nothing twice. Everything else is sent at most once."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request goes. `addresses` were resolved and checked before and are the only ones that are
    connected to, in this order; `host` stays the name in messages, and in SNI and certificate unless `sni` says
    another."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    addresses: tuple[str, ...]
    sni: str = ""
    verify: bool = True

    @property
    def server_name(self) -> str:
        return self.sni or self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request as it is to stand on the wire. `body` has no transfer coding; `wire.render` frames it as the
    headers say. `http_version` is HTTP/1.1 or HTTP/1.0."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes = b""
    trailers: Headers = ()
    http_version: str = "HTTP/1.1"


@dataclass(frozen=True, slots=True)
class Interim:
    """A 1xx answer that came before the final one."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]


class RawResponse(Struct, frozen=True):
    """An answer as it came, without transfer coding, content coding kept.

    `body` is the stored part, `body_size` the true size in bytes; `sha256` is over the whole body and b"" when the
    body is stored whole (then it can be computed from it). `complete` is False for what was seen of an answer
    that broke off. Times are microseconds from the call of `send`; `deviations` say how the request that was sent
    differs from the one that was given.
    """

    status: int
    reason: bytes
    http_version: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    body_size: int
    trailers: list[tuple[bytes, bytes]] = []
    truncated: bool = False
    sha256: bytes = b""
    complete: bool = True
    interim: list[Interim] = []
    timing: Timing = NO_TIMING
    client: Peer = NO_PEER
    server: Peer = NO_PEER
    reused: bool = False
    deviations: tuple[str, ...] = ()


class Unsendable(MegidoError):
    """A request that cannot be put on an HTTP/1 wire without becoming another one. Nothing was sent."""


class SendError(MegidoError):
    """No whole answer. `sent` is False only when not one byte of the request can have reached the target.

    `response` is what had been seen of the answer; `timing`, `client` and `server` what is known of the connection.
    """

    def __init__(
        self,
        error_type: ErrorType,
        message: str,
        *,
        sent: bool = False,
        response: RawResponse | None = None,
        timing: Timing | None = None,
        client: Peer | None = None,
        server: Peer | None = None,
    ) -> None:
        super().__init__(message)
        self.error_type = error_type
        self.sent = sent
        self.response = response
        self.timing = timing or NO_TIMING
        self.client = client or NO_PEER
        self.server = server or NO_PEER
