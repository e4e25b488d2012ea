"""From a stored flow and a job's options to the request that is sent. No I/O."""

from dataclasses import dataclass
from typing import Literal, cast

from megido_replayer import target as targets
from megido_replayer.target import Target
from megido_replayer.transport import RawRequest
from megido_shared import events
from megido_shared.db import codecs
from megido_shared.db.read import StoredFlow
from megido_shared.errors import MegidoError
from megido_shared.replay import ReplayOptions

type Pairs = list[tuple[bytes, bytes]]


class CannotReplay(MegidoError):
    """A flow that cannot be sent again as what it was. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request and where it goes, before the name is resolved. `deviations` say how it differs from the original."""

    request: RawRequest
    to: Target
    sni: str = ""
    deviations: tuple[str, ...] = ()


def prepare(flow: StoredFlow, options: ReplayOptions) -> Prepared:
    """Raises CannotReplay and target.BadTarget with what is wrong, for the item's error."""
    row = flow.row
    if row.scheme not in ("http", "https"):
        raise CannotReplay("a WebSocket conversation cannot be replayed as a single request")
    if not flow.request_body.whole:
        stored, size = len(flow.request_body.data), flow.request_body.size
        raise CannotReplay(
            f"the request's body was not stored whole ({stored} of {size} bytes), so it would be another request; "
            "raise max_body_size before capturing what is to be replayed"
        )
    deviations: list[str] = []
    original = bytes(row.target)
    if options.target_url:
        to = targets.override(options.target_url, original)
    else:
        to = Target(cast(Literal["http", "https"], row.scheme), row.host, row.port, original)
    headers = _for_http1(flow, to, deviations)
    if options.target_url:
        headers = _with_host(headers, to, deviations)
    request = RawRequest(
        method=flow.detail.original.get("method") or row.method.encode(),
        target=to.target,
        headers=headers,
        body=flow.request_body.data,
        trailers=_trailers(row.request_trailers),
        http_version="HTTP/1.0" if row.http_version == "HTTP/1.0" else "HTTP/1.1",
    )
    return Prepared(request, to, "" if options.target_url else flow.detail.client.sni, tuple(deviations))


def _for_http1(flow: StoredFlow, to: Target, deviations: list[str]) -> Pairs:
    headers = list(flow.request_headers)
    version = flow.row.http_version
    if not version.startswith("HTTP/1"):
        deviations.append(f"http-version: recorded as {version}, sent as HTTP/1.1")
        headers = _join_cookies([pair for pair in headers if not pair[0].startswith(b":")])
    if version != "HTTP/1.0" and not any(name.lower() == b"host" for name, _ in headers):
        headers.insert(0, (b"Host", bytes(flow.row.authority) or to.authority))
        deviations.append("host: added")
    return headers


def _join_cookies(headers: Pairs) -> Pairs:
    """HTTP/2 may split one Cookie header into several; HTTP/1 must not have more than one (RFC 9113 8.2.3)."""
    cookies = [value for name, value in headers if name.lower() == b"cookie"]
    if len(cookies) < 2:
        return headers
    joined: Pairs = []
    for name, value in headers:
        if name.lower() != b"cookie":
            joined.append((name, value))
        elif cookies:
            joined.append((name, b"; ".join(cookies)))
            cookies = []
    return joined


def _with_host(headers: Pairs, to: Target, deviations: list[str]) -> Pairs:
    """Host follows an override, in its place and case."""
    changed = [(name, to.authority if name.lower() == b"host" else value) for name, value in headers]
    if changed != headers:
        deviations.append(f"host: {to.authority.decode()}, as the target")
    return changed


def _trailers(stored: bytes | None) -> Pairs:
    return [] if stored is None else events.unpack_headers(codecs.unpack(bytes(stored)))
