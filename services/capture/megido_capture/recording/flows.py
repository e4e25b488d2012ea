"""From mitmproxy's objects to our events' parts. Pure: no I/O, no clock, nothing kept.

Everything is taken as bytes as it crossed the wire: `.headers.fields` keeps order, case and duplicates, and
`.data.content` keeps the content coding (`.content` would inflate it without a limit).
"""

from hashlib import sha256

from mitmproxy import connection, http

from megido_shared.events import EMPTY_BODY, NO_HEADERS, Body, Peer, Request, Response, pack_headers

_SECRET = b"proxy-authorization"
_LOOKED_AT = frozenset(len(name) for name in (_SECRET, b"upgrade", b"sec-websocket-key"))
"""Lengths of the names that decide what is recorded of a request."""
_VERSIONS = {b"HTTP/1.1": "HTTP/1.1", b"HTTP/2.0": "HTTP/2.0", b"HTTP/1.0": "HTTP/1.0"}
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def request_of(request: http.Request, body: Body) -> Request:
    """The request as it is sent upstream. `Proxy-Authorization` is never part of it."""
    data = request.data
    fields = data.headers.fields
    scheme = "https" if data.scheme == b"https" else "http"
    for name, _ in fields:
        if len(name) in _LOOKED_AT:  # most heads have no such name
            fields, scheme = _without_secret(fields), scheme_of(request)
            break
    return Request(
        method=data.method,
        scheme=scheme,
        host=data.host,
        port=data.port,
        target=data.path,
        authority=data.authority,
        http_version=_VERSIONS.get(data.http_version) or data.http_version.decode("ascii", "replace"),
        headers=pack_headers(fields),
        trailers=pack_headers(data.trailers.fields) if data.trailers else NO_HEADERS,
        body=body,
    )


def response_of(response: http.Response, body: Body) -> Response:
    data = response.data
    return Response(
        status=data.status_code,
        reason=data.reason,
        http_version=_VERSIONS.get(data.http_version) or data.http_version.decode("ascii", "replace"),
        headers=pack_headers(data.headers.fields),
        trailers=pack_headers(data.trailers.fields) if data.trailers else NO_HEADERS,
        body=body,
    )


def body_of(content: bytes | None, cap: int) -> Body:
    """A whole body, of which at most `cap` bytes are kept. The hash of one that is kept whole is left to ingest."""
    if not content:
        return EMPTY_BODY
    size = len(content)
    if size <= cap:
        return Body(data=content, size=size)
    return Body(data=content[:cap], size=size, sha256=sha256(content).digest(), truncated=True)


def is_websocket_handshake(request: http.Request) -> bool:
    """An HTTP/1.1 upgrade to WebSocket (RFC 6455, 4.1), whatever the server answers."""
    upgrade = key = False
    for name, value in request.data.headers.fields:
        length = len(name)
        if length == 7 and name.lower() == b"upgrade":
            upgrade = b"websocket" in value.lower()
        elif length == 17 and name.lower() == b"sec-websocket-key":
            key = True
    return upgrade and key


def scheme_of(request: http.Request) -> str:
    secure = request.data.scheme == b"https"
    if is_websocket_handshake(request):
        return "wss" if secure else "ws"
    return "https" if secure else "http"


def url_of(request: http.Request) -> str:
    """The URL that a person would write: no default port, target as it is on the wire."""
    return url_from(scheme_of(request), request.data.host, request.data.port, request.data.path)


def url_from(scheme: str, host: str, port: int, target: bytes) -> str:
    shown = f"[{host}]" if ":" in host else host
    if port != _DEFAULT_PORTS.get(scheme):
        shown = f"{shown}:{port}"
    path = target.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()
    return f"{scheme}://{shown}{path if path.startswith('/') else '/' + path}"


def client_peer(client: connection.Client) -> Peer:
    return Peer(
        ip=plain_ip(client.peername[0]),
        port=client.peername[1],
        tls=client.tls_version or "",
        alpn=_text(client.alpn),
        sni=client.sni or "",
    )


def server_peer(server: connection.Server) -> Peer:
    """The upstream's address; empty when nothing was connected."""
    if server.peername is None:
        return Peer()
    return Peer(
        ip=plain_ip(server.peername[0]),
        port=server.peername[1],
        tls=server.tls_version or "",
        alpn=_text(server.alpn),
        sni=(server.sni or "") if server.tls else "",
    )


def plain_ip(address: str) -> str:
    """An IPv4-mapped IPv6 address as the IPv4 address that it is, without a zone."""
    return address.removeprefix("::ffff:").partition("%")[0] if ":" in address else address


def content_length(headers: http.Headers) -> int | None:
    """The declared length, or None: chunked, close-delimited, HTTP/2 without one, or nonsense."""
    length: int | None = None
    for name, value in headers.fields:
        size = len(name)
        if size == 17 and name.lower() == b"transfer-encoding":
            return None
        if size == 14 and name.lower() == b"content-length" and value.isdigit():
            length = int(value)
    return length


def _without_secret(fields: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
    for name, _ in fields:
        if len(name) == 19 and name.lower() == _SECRET:
            return tuple(pair for pair in fields if pair[0].lower() != _SECRET)
    return fields


def _text(value: bytes | None) -> str:
    return value.decode("ascii", "replace") if value else ""
