"""Where a replay goes: the original's place, or the override's."""

from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import quote, urlsplit

from megido_shared.errors import MegidoError

_DEFAULT_PORTS = {"http": 80, "https": 443}
_KEPT_IN_URLS = "/?#[]@!$&'()*+,;=:%~|\\^`{}<>\""
"""Everything that a person may have written on purpose; spaces, control characters and non-ASCII are encoded."""


class BadTarget(MegidoError):
    """A target URL that cannot be sent to."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place to send to. `target` is the raw path and query."""

    scheme: Literal["http", "https"]
    host: str
    port: int
    target: bytes

    @property
    def authority(self) -> bytes:
        """What a Host header says: the port only where it is not the scheme's own."""
        host = self.host.encode() if self.host.isascii() else self.host.encode("idna")
        if b":" in host:
            host = b"[" + host + b"]"
        return host if self.port == _DEFAULT_PORTS[self.scheme] else b"%b:%d" % (host, self.port)


def override(url: str, original: bytes) -> Target:
    """Another scheme, host and port; the original path and query too, unless `url` has a path of its own (then
    path and query are the URL's, as it is written). Raises BadTarget."""
    whole = parse(url)
    return whole if whole.target != b"/" else Target(whole.scheme, whole.host, whole.port, original)


def parse(url: str) -> Target:
    """A whole URL. Raises BadTarget."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode() if parts.hostname else ""
    except ValueError as error:  # UnicodeError is one
        raise BadTarget(f"the target {url!r} is no URL: {error}") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise BadTarget(f"the target {url!r} must begin with http:// or https://")
    if not host:
        raise BadTarget(f"the target {url!r} names no host")
    if parts.username is not None:
        raise BadTarget(f"the target {url!r} must not hold credentials; replay keeps the request's own headers")
    path = quote(parts.path or "/", safe=_KEPT_IN_URLS)
    query = "?" + quote(parts.query, safe=_KEPT_IN_URLS) if parts.query else ""
    scheme = cast(Literal["http", "https"], parts.scheme)
    return Target(scheme, host, port or _DEFAULT_PORTS[scheme], (path + query).encode())
