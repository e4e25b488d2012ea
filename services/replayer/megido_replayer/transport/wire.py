"""A request as the bytes of HTTP/1: what was recorded, in order, with its case and duplicates.

Only framing is ever changed, because a request whose length is told wrong is another request; each change is said
in `Wire.deviations`.
"""

import re

from msgspec import Struct

from megido_replayer.transport.messages import Headers, RawRequest, Unsendable

type Notable = dict[bytes, list[bytes]]
"""Values in order, by lower name, of the headers in `_NOTABLE`."""

_UNSAFE_IN_TARGET = re.compile(rb"[\x00-\x20\x7f]")
_NOTABLE = frozenset((b"content-length", b"transfer-encoding", b"connection"))
_BREAKS = re.compile(rb"[\r\n\0]")


class Wire(Struct, frozen=True):
    """`data` is the whole message; `target`, `headers` and `trailers` are those within it. `keep_alive` is False
    when the request itself asks that the connection be closed."""

    method: bytes
    target: bytes
    data: bytes
    headers: list[tuple[bytes, bytes]]
    trailers: list[tuple[bytes, bytes]]
    keep_alive: bool
    deviations: tuple[str, ...]


def render(request: RawRequest) -> Wire:
    """Raises Unsendable when method, header or framing cannot be put on the wire as they are."""
    deviations: list[str] = []
    headers, notable = _scan(request.headers, deviations)
    chunked = _is_chunked(notable[b"transfer-encoding"]) if b"transfer-encoding" in notable else False
    if chunked:
        headers = _without_length(headers, notable, deviations)
        if request.body:
            deviations.append("transfer-encoding: chunk sizes are not recorded, the body is one chunk")
    else:
        headers = _with_right_length(headers, notable, len(request.body), deviations)
    trailers = list(request.trailers) if chunked else []
    if request.trailers and not chunked:
        deviations.append("trailers: left out, the body is not chunked")
    target = _target(request.target, deviations)
    head = _head(request, target, headers)
    return Wire(
        method=request.method,
        target=target,
        data=head + (_chunked_body(request.body, trailers) if chunked else request.body),
        headers=headers,
        trailers=trailers,
        keep_alive=_keeps_alive(request.http_version, notable),
        deviations=tuple(deviations),
    )


def _scan(headers: Headers, deviations: list[str]) -> tuple[list[tuple[bytes, bytes]], Notable]:
    """One pass: the headers that are sent, and the values of those that framing and reuse depend on."""
    kept: list[tuple[bytes, bytes]] = []
    notable: Notable = {}
    for pair in headers:
        name = pair[0]
        lower = name.lower().strip()  # a space before the colon fools some parsers: it counts as the header
        if lower in _NOTABLE:
            notable.setdefault(lower, []).append(pair[1])
        elif lower[:6] == b"proxy-":
            deviations.append(f"{lower.decode('latin-1')}: not sent, it is meant for a proxy")
            continue
        elif not name or b":" in name:
            raise Unsendable(f"the header name {name!r} cannot be sent in HTTP/1")
        kept.append(pair)
    return kept, notable


def _is_chunked(values: list[bytes]) -> bool:
    codings = [coding.strip() for value in values for coding in value.lower().split(b",")]
    if codings[-1] == b"chunked":
        return True
    raise Unsendable(
        f"the request has Transfer-Encoding {b', '.join(codings).decode('latin-1')!r}, "
        "which does not end in chunked, so its length cannot be told to the target"
    )


def _without_length(
    headers: list[tuple[bytes, bytes]], notable: Notable, deviations: list[str]
) -> list[tuple[bytes, bytes]]:
    """Content-Length beside chunked is a smuggling shape (RFC 9112 6.1)."""
    if b"content-length" not in notable:
        return headers
    deviations.append("content-length: not sent beside Transfer-Encoding")
    return [pair for pair in headers if pair[0].strip().lower() != b"content-length"]


def _with_right_length(
    headers: list[tuple[bytes, bytes]], notable: Notable, size: int, deviations: list[str]
) -> list[tuple[bytes, bytes]]:
    told = notable.get(b"content-length")
    if told is None:
        if size:
            deviations.append(f"content-length: added, the body has {size} bytes")
            return [*headers, (b"Content-Length", b"%d" % size)]
        return headers
    right = b"%d" % size
    if all(value == right for value in told):
        return headers
    deviations.append(f"content-length: corrected from {b', '.join(told).decode('latin-1')} to {size}")
    corrected: list[tuple[bytes, bytes]] = []
    seen = False
    for name, value in headers:
        if name.strip().lower() != b"content-length":
            corrected.append((name, value))
        elif not seen:
            corrected.append((name, right))
            seen = True
    return corrected


def _target(target: bytes, deviations: list[str]) -> bytes:
    if not target:
        deviations.append("target: empty, sent as /")
        return b"/"
    if _UNSAFE_IN_TARGET.search(target) is None:
        return target
    deviations.append("target: spaces and control characters percent-encoded")
    return _UNSAFE_IN_TARGET.sub(lambda found: b"%%%02X" % found[0][0], target)


def _head(request: RawRequest, target: bytes, headers: Headers) -> bytes:
    if request.http_version not in ("HTTP/1.1", "HTTP/1.0"):
        raise Unsendable(f"{request.http_version} is no version of HTTP/1")
    if not request.method or _UNSAFE_IN_TARGET.search(request.method):
        raise Unsendable(f"the method {request.method!r} cannot be sent")
    first = b"%b %b %b\r\n" % (request.method, target, request.http_version.encode())
    return first + _lines(headers) + b"\r\n"


def _lines(headers: Headers) -> bytes:
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    # One look at the whole instead of one at each value.
    if lines.count(b"\r") != len(headers) or lines.count(b"\n") != len(headers) or b"\0" in lines:
        _refuse_breaks(headers)
    return lines


def _refuse_breaks(headers: Headers) -> None:
    for name, value in headers:
        if _BREAKS.search(name) or _BREAKS.search(value):
            raise Unsendable(f"the header {name!r} holds a line break or a NUL and cannot be sent in HTTP/1")


def _chunked_body(body: bytes, trailers: Headers) -> bytes:
    if any(not name or b":" in name for name, _ in trailers):
        raise Unsendable("a trailer has a name that cannot be sent in HTTP/1")
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return chunk + b"0\r\n" + _lines(trailers) + b"\r\n"


def _keeps_alive(http_version: str, notable: Notable) -> bool:
    values = notable.get(b"connection", ())
    tokens = {token.strip().lower() for value in values for token in value.split(b",")}
    return b"keep-alive" in tokens if http_version == "HTTP/1.0" else b"close" not in tokens
