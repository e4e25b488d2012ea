"""Bounds the heads of requests and responses while they arrive. mitmproxy reads them whole, however large, and has
no hook before that.

A request head above the caps is answered 431 and its connection closed; a response head above them gives its client
502, as other proxies do: cut short it could be neither forwarded truly nor replayed.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol
from weakref import WeakSet

import h2.errors
import h2.events
import h2.exceptions
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer, blank_line_regex
from mitmproxy import connection
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import _base, _events, _http1, _http2

from megido_capture.mitm.calm import excess, keep_calm
from megido_capture.mitm.framing import head_flaw

MAX_BYTES = 256 * 1024
"""Of a head as HTTP/1 writes it: first line, fields and the empty line."""

MAX_FIELDS = 1000
MAX_TRAILER_BYTES = 64 * 1024
"""Trailers travel in the same record as the heads."""

MAX_AHEAD = 1 << 20
"""Bytes of further requests that may come while one is answered. They are held."""

DECODED = 4 * MAX_BYTES
"""Where HPACK stops decoding. Up to here an HTTP/2 head gets its 431; above, the connection's end is the answer."""

LINGER_STEP = 0.25
LINGER_STEPS = 8
"""A refused client is read, and what it sends dropped, until it is silent for a step, so that it can read its 431."""

_FIELD = 32
"""What HTTP/2 counts for each field beside its bytes (RFC 9113, 6.5.2)."""
_PEER_CLOSED = "peer closed connection"
"""What mitmproxy calls the end of an HTTP/2 connection whose bytes have ended."""

_HEADERS_FRAME = b"\x01"
"""The type of a HEADERS frame, behind its length."""
_SMALL = 3 * MAX_FIELDS
"""Fewer bytes than this hold neither too many bytes nor too many fields."""


_BEGUN = re.compile(rb"[^\r\n]")

_H2_SERVERS: WeakSet[_http2.Http2Server] = WeakSet()
"""The HTTP/2 connections of clients."""


class Observer(Protocol):
    def refused_head(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        """A request head was refused, before there was a flow. `target` is that of the tunnel, if there is one."""

    def unfinished_head(self, conn: connection.Client, target: tuple[str, int] | None, *, left: bool) -> None:
        """A connection ended within the head of a request. `left`: its client ended it."""

    def broken_request(self, conn: connection.Client, message: str) -> None:
        """The open flow of an HTTP/1 connection ends, for what its client sent after the head."""


_h1_server_head = _http1.Http1Server.read_headers
_h1_client_head = _http1.Http1Client.read_headers
_h1_body = _http1.Http1Connection.read_body
_h1_wait = _http1.Http1Connection.wait
_h2_closed = _http2.Http2Connection.close_connection
_h2_init = _http2.Http2Connection.__init__
_h2_server_event = _http2.Http2Server.handle_h2_event
_h2_client_event = _http2.Http2Client.handle_h2_event


def guard_heads(observer: Observer, head_begun: Callable[[connection.Client], None]) -> None:
    """Puts the guard into mitmproxy's HTTP/1 and HTTP/2 layers. `head_begun` is told when a head over HTTP/1 comes in
    pieces."""

    def server_head(self: _http1.Http1Server, event: events.ConnectionEvent) -> CommandGenerator[None]:
        if isinstance(event, events.ConnectionClosed) and _is_partial(self.buf):
            observer.unfinished_head(self.context.client, self.context.server.address, left=_was_left(self.conn))
            self.buf._extract(len(self.buf))  # mitmproxy would log it, credentials and all
        if len(self.buf) > _SMALL and isinstance(event, events.DataReceived) and (why := head_excess(self.buf)):
            return _refuse(self, why, observer)
        if isinstance(event, events.DataReceived) and (why := head_flaw(self.buf)):
            return _refuse(self, why, observer, "400 Bad Request")
        # Most heads come whole, with nothing behind them.
        if (
            isinstance(event, events.DataReceived)
            and not self.buf._data.endswith(b"\r\n\r\n")
            and _is_partial(self.buf)
        ):
            head_begun(self.context.client)
        return _h1_server_head(self, event)

    def server_event(self: _http2.Http2Server, event: h2.events.Event) -> CommandGenerator[bool]:
        if isinstance(event, h2.events.RequestReceived) and (why := fields_excess(event.headers)):
            return _refuse_stream(self, event.stream_id, why, observer)
        if why := excess(event, self.h2_conn):
            return _too_much(self, why)
        if isinstance(event, h2.events.TrailersReceived) and (why := fields_excess(event.headers, MAX_TRAILER_BYTES)):
            return _reset_stream(self, event.stream_id, f"request trailers: {why}")
        if isinstance(event, h2.exceptions.ProtocolError) and _is_excess(event):
            observer.refused_head(
                self.context.client, f"HTTP/2 protocol error: request head: {event}", self.context.server.address
            )
        return _h2_server_event(self, event)

    def closed(self: _http2.Http2Server, message: str) -> CommandGenerator[None]:
        if message == _PEER_CLOSED and _within_head(self):
            observer.unfinished_head(self.context.client, self.context.server.address, left=_was_left(self.conn))
        return _h2_closed(self, message)

    _http1.Http1Server.read_headers = server_head  # type: ignore[method-assign]
    _http1.Http1Client.read_headers = _client_head  # type: ignore[method-assign]

    def wait(self: _http1.Http1Connection, event: events.Event) -> CommandGenerator[None]:
        # While an answer is awaited, the next request may come already: its head is bounded too.
        if len(self.buf) > MAX_BYTES and isinstance(event, events.DataReceived) and (why := head_excess(self.buf)):
            return _give_up(self, f"request head of {why}", observer)
        if len(self.buf) > MAX_AHEAD and isinstance(event, events.DataReceived):
            return _give_up(self, f"more than {MAX_AHEAD:,} bytes ahead of an answer", observer)
        return _h1_wait(self, event)

    def body(self: _http1.Http1Connection, event: events.Event) -> CommandGenerator[None]:
        if len(self.buf) > MAX_BYTES and isinstance(event, events.DataReceived):
            return _bounded_body(self, event, observer)
        if isinstance(self, _http1.Http1Server) and isinstance(self.body_reader, ChunkedReader):
            return _chunked_body(self, event, observer)
        return _h1_body(self, event)

    _http1.Http1Connection.read_body = body  # type: ignore[method-assign]
    _http1.Http1Connection.wait = wait  # type: ignore[method-assign]
    _http2.Http2Connection.__init__ = _init_h2  # type: ignore[method-assign]
    _http2.Http2Server.handle_h2_event = server_event  # type: ignore[method-assign]
    _http2.Http2Client.handle_h2_event = _client_event  # type: ignore[method-assign]
    _http2.Http2Server.close_connection = closed  # type: ignore[method-assign,assignment]


def stop_guarding() -> None:
    """Takes the guard out again."""
    _http1.Http1Server.read_headers = _h1_server_head  # type: ignore[method-assign]
    _http1.Http1Client.read_headers = _h1_client_head  # type: ignore[method-assign]
    _http1.Http1Connection.read_body = _h1_body  # type: ignore[method-assign]
    _http1.Http1Connection.wait = _h1_wait  # type: ignore[method-assign]
    _http2.Http2Connection.__init__ = _h2_init  # type: ignore[method-assign]
    _http2.Http2Server.handle_h2_event = _h2_server_event  # type: ignore[method-assign]
    _http2.Http2Client.handle_h2_event = _h2_client_event  # type: ignore[method-assign]
    if "close_connection" in vars(_http2.Http2Server):
        del _http2.Http2Server.close_connection  # its base class's is the original


def head_excess(buf: ReceiveBuffer) -> str:
    """Why the head at the start of the buffer, whole or not yet, is too large; empty when it is not."""
    data = buf._data
    if data.startswith((b"\r", b"\n")):
        # Empty lines ahead of a head mean nothing, and h11 takes one for each read: they would pile up.
        buf._extract(len(data) - len(data.lstrip(b"\r\n")))
    found = blank_line_regex.search(data, buf._multiple_lines_search)
    size = found.end() if found else len(data)
    if size > MAX_BYTES:
        return f"more than {MAX_BYTES:,} bytes"
    if found and data.count(b"\n", 0, size) - 2 > MAX_FIELDS:
        return f"more than {MAX_FIELDS:,} fields"
    return ""


def _is_partial(buf: ReceiveBuffer) -> bool:
    """Empty lines ahead of a head are no part of it."""
    data = buf._data
    return _BEGUN.search(data) is not None and not blank_line_regex.search(data, buf._multiple_lines_search)


def unfinished() -> Iterator[tuple[connection.Client, bool]]:
    """The clients of whose HTTP/2 connection a frame has come in part only, and whether a request's head has."""
    for server in list(_H2_SERVERS):
        context = getattr(server, "context", None)  # none: it has ended, and was taken apart
        if context is not None and (server.h2_conn.incoming_buffer._data or _within_head(server)):
            yield context.client, _within_head(server)


def _within_head(server: _http2.Http2Server) -> bool:
    frames = server.h2_conn.incoming_buffer
    return bool(frames._headers_buffer) or frames._data[3:4] == _HEADERS_FRAME


def _was_left(conn: connection.Connection) -> bool:
    """Whether its client has closed it, or reset it. One that is cut here cannot be written to any more."""
    return bool(conn.state & connection.ConnectionState.CAN_WRITE)


def fields_excess(headers: Iterable[tuple[Any, Any]] | None, max_bytes: int = MAX_BYTES) -> str:
    """The same for decoded fields, counted as HTTP/1 would write them."""
    fields = size = 0
    for name, value in headers or ():
        size += len(name) + len(value) + 4
        fields += name[:1] != b":"
    if size > max_bytes:
        return f"more than {max_bytes:,} bytes"
    return f"more than {MAX_FIELDS:,} fields" if fields > MAX_FIELDS else ""


class _Linger:
    """The state of a refused HTTP/1 connection."""

    def __init__(self, owner: _http1.Http1Server) -> None:
        self._owner = owner
        self._heard = True
        self._steps = 0

    def __call__(self, event: events.Event) -> CommandGenerator[None]:
        owner = self._owner
        owner.buf._extract(len(owner.buf))
        if isinstance(event, events.DataReceived):
            self._heard = True
        elif isinstance(event, events.Wakeup) and self._heard and self._steps < LINGER_STEPS:
            self._steps += 1
            self._heard = False
            yield commands.RequestWakeup(LINGER_STEP)
        else:
            yield commands.CloseConnection(owner.conn)
            owner.state = owner.done


def _refuse(
    self: _http1.Http1Server, why: str, observer: Observer, status: str = "431 Request Header Fields Too Large"
) -> CommandGenerator[None]:
    observer.refused_head(
        self.context.client, f"HTTP/1 protocol error: request head of {why}", self.context.server.address
    )
    self.buf._extract(len(self.buf))
    self.state = _Linger(self)
    body = _explanation(why)
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    yield commands.SendData(self.conn, head.encode() + body)
    yield commands.RequestWakeup(LINGER_STEP)


def _client_head(self: _http1.Http1Client, event: events.ConnectionEvent) -> CommandGenerator[None]:
    waiting = self.request is not None and len(self.buf) > _SMALL and isinstance(event, events.DataReceived)
    if waiting and (why := head_excess(self.buf)):
        return _give_up(self, f"response head of {why}")
    return _h1_client_head(self, event)


def _bounded_body(self: _http1.Http1Connection, event: events.Event, observer: Observer) -> CommandGenerator[None]:
    """A chunk's data is taken as it comes, so what stays behind is a chunk's size line or the trailers."""
    reader = self.body_reader
    yield from _h1_body(self, event)
    waits = self.state == self.read_body and self.body_reader is reader and isinstance(reader, ChunkedReader)
    if waits and len(self.buf) > MAX_TRAILER_BYTES:
        yield from _give_up(self, "a chunk's size line or trailers too large", observer)


def _chunked_body(self: _http1.Http1Connection, event: events.Event, observer: Observer) -> CommandGenerator[None]:
    """Where the chunks are broken, the connection's end may be told sooner than why."""
    for command in _h1_body(self, event):
        if isinstance(command, _base.ReceiveHttp) and isinstance(command.event, _events.RequestProtocolError):
            observer.broken_request(self.context.client, command.event.message)
        yield command


def _give_up(self: _http1.Http1Connection, what: str, observer: Observer | None = None) -> CommandGenerator[None]:
    """Ends the connection and its flow."""
    assert self.stream_id is not None
    message = f"HTTP/1 protocol error: {what}"
    kind = self.ReceiveProtocolError
    if observer is not None and kind is _events.RequestProtocolError:
        # A stream that waits for its upstream learns of nothing before its client is gone.
        observer.broken_request(self.context.client, message)
    self.buf._extract(len(self.buf))
    self.state = self.done
    yield commands.CloseConnection(self.conn)
    yield _base.ReceiveHttp(kind(self.stream_id, message, kind.code))


def _init_h2(self: _http2.Http2Connection, *args: Any, **kwargs: Any) -> None:
    _h2_init(self, *args, **kwargs)
    # As mitmproxy does with its own settings: without the acknowledgement the old ones would be sent.
    self.h2_conn.local_settings.max_header_list_size = MAX_BYTES + MAX_FIELDS * _FIELD
    self.h2_conn.local_settings.acknowledge()
    self.h2_conn.decoder.max_header_list_size = DECODED
    keep_calm(self.h2_conn, client=isinstance(self, _http2.Http2Server), max_block=DECODED)
    if isinstance(self, _http2.Http2Server):
        _H2_SERVERS.add(self)


def _refuse_stream(self: _http2.Http2Server, stream_id: int, why: str, observer: Observer) -> CommandGenerator[bool]:
    message = f"HTTP/2 protocol error: request head of {why}"
    observer.refused_head(self.context.client, message, self.context.server.address)
    body = _explanation(why)
    headers = [
        (b":status", b"431"),
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
    ]
    self.h2_conn.send_headers(stream_id, headers)
    self.h2_conn.send_data(stream_id, body, end_stream=True)
    yield from self.protocol_error(message, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
    return True


def _too_much(self: _http2.Http2Server, why: str) -> CommandGenerator[bool]:
    yield from self.protocol_error(f"HTTP/2 protocol error: {why}", h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
    return True


def _client_event(self: _http2.Http2Client, event: h2.events.Event) -> CommandGenerator[bool]:
    if isinstance(event, h2.events.ResponseReceived) and (why := fields_excess(event.headers)):
        return _reset_stream(self, event.stream_id, f"response head of {why}")
    if isinstance(event, h2.events.TrailersReceived) and (why := fields_excess(event.headers, MAX_TRAILER_BYTES)):
        return _reset_stream(self, event.stream_id, f"response trailers of {why}")
    return _h2_client_event(self, event)


def _reset_stream(self: _http2.Http2Connection, stream_id: int, what: str) -> CommandGenerator[bool]:
    """Ends one exchange; the connection and its other streams go on."""
    self.streams.pop(stream_id, None)
    if not self.is_closed(stream_id):
        self.h2_conn.reset_stream(stream_id, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
    kind = self.ReceiveProtocolError
    yield _base.ReceiveHttp(kind(stream_id, f"HTTP/2 protocol error: {what}", kind.code))
    return False


def _is_excess(error: h2.exceptions.ProtocolError) -> bool:
    return isinstance(error, h2.exceptions.DenialOfServiceError) or "continuation frames" in str(error)


def _explanation(why: str) -> bytes:
    return f"Megido refuses the request: its head has {why}.\n".encode()
