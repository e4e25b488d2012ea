"""One HTTP/1 connection: writes a message as given, parses what comes back with llhttp (httptools).

A protocol, not streams: one future an exchange and no task, which is what makes it several times faster than a
client that reads through layers.
"""

import asyncio
import hashlib
import time
from typing import Any, Literal, cast

import httptools

from megido_replayer.transport.messages import Interim, RawResponse
from megido_shared.events import Peer, Timing

MAX_HEAD_BYTES = 256 * 1024
MAX_FIELDS = 1000
MAX_INTERIM = 32

type Trouble = Literal["closed", "reset", "protocol", "timeout"]


class ConnectionTrouble(Exception):
    """The exchange cannot end well. `kind`: the peer closed or reset the connection, broke the
    protocol, or the deadline passed.

    `stale`: nothing at all came back on a connection that had been used before, so that it was most likely closed
    before the request reached anybody.
    """

    def __init__(self, kind: Trouble, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.kind: Trouble = kind
        self.stale = stale


class _Stop(Exception):
    """Leaves llhttp from within a callback: what follows on this connection is not parsed any more."""


class Connection(asyncio.Protocol):
    """Carries one exchange at a time. Made connected by `pool.Pool`; `usable` says whether another may follow."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, sni: str = "") -> None:
        self._loop = loop
        self._sni = sni
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self.client = Peer()
        self.server = Peer()
        self.connect_us = -1
        self.tls_us = -1
        self.usable = True
        self.exchanges = 0
        self.idle_since = 0.0

        # The exchange under way; `_begin` and `_begin_head` set these anew.
        self._head_request = False
        self._keep_alive = True
        self._max_body = 0
        self._interim: list[Interim] = []
        self._first_byte = 0.0
        self._ended = 0.0
        self._silent = 0  # bytes since the parser last made something of them
        self._field_bytes = 0
        self._head_done = False
        self._done = False
        self._status = 0
        self._reason = b""
        self._version = ""
        self._headers: list[tuple[bytes, bytes]] = []
        self._trailers: list[tuple[bytes, bytes]] = []
        self._body: bytes | bytearray = b""
        self._size = 0
        self._hash: Any = None

    # What the sender calls

    async def exchange(
        self, data: bytes, *, head_request: bool, keep_alive: bool, max_body: int, timeout_s: float
    ) -> None:
        """Writes `data` and returns when the whole answer is there (see `response`).

        Stores at most `max_body` bytes of the body and counts the rest. Raises ConnectionTrouble. Cancelled, it
        closes the connection.
        """
        transport = self._transport
        if transport is None or not self.alive:
            self.abort()
            raise ConnectionTrouble("closed", "the connection was closed", stale=self.exchanges > 0)
        self._begin(head_request=head_request, keep_alive=keep_alive, max_body=max_body)
        self._waiter = self._loop.create_future()
        self.exchanges += 1
        # Not asyncio.timeout: it costs more than parsing the answer.
        alarm = self._loop.call_later(timeout_s, self._fail, "timeout", "no whole answer in time")
        transport.write(data)
        try:
            await self._waiter
        except BaseException:
            self.abort()
            raise
        finally:
            alarm.cancel()
            self._waiter = None
        if not self.usable or transport.get_write_buffer_size():
            self.abort()

    def response(self, started: float, deviations: tuple[str, ...] = ()) -> RawResponse | None:
        """What has been seen of the answer to the last exchange; None before its head was whole. `started` is on
        the clock of `time.monotonic`."""
        if not self._head_done:
            return None
        return RawResponse(
            status=self._status,
            reason=self._reason,
            http_version=self._version,
            headers=self._headers,
            body=bytes(self._body),
            body_size=self._size,
            trailers=self._trailers,
            truncated=self._hash is not None,
            sha256=b"" if self._hash is None else self._hash.digest(),
            complete=self._done,
            interim=self._interim,
            timing=self.timing(started),
            client=self.client,
            server=self.server,
            reused=self.exchanges > 1,
            deviations=deviations,
        )

    def timing(self, started: float) -> Timing:
        """Microseconds from `started`; connect and TLS only with the first exchange."""
        first = self.exchanges <= 1
        return Timing(
            connect_us=self.connect_us if first else -1,
            tls_us=self.tls_us if first else -1,
            first_byte_us=int((self._first_byte - started) * 1e6) if self._first_byte else -1,
            response_us=int(((self._ended or time.monotonic()) - started) * 1e6),
        )

    @property
    def alive(self) -> bool:
        """Whether another exchange can be tried; the peer may have closed it all the same."""
        return self.usable and self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Closes at once. May be called at any time, more than once."""
        self.usable = False
        self._parser = None  # it holds our bound methods: a cycle
        if self._transport is not None and not self._transport.is_closing():
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._parser = self._new_parser()
        self.client = _peer(transport.get_extra_info("sockname"))
        tls = transport.get_extra_info("ssl_object")
        self.server = _peer(
            transport.get_extra_info("peername"),
            tls="" if tls is None else tls.version() or "",
            alpn="" if tls is None else tls.selected_alpn_protocol() or "",
            sni="" if tls is None else self._sni,
        )

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            # Nobody asked for it: the start of a response splitting, or a server's goodbye.
            self.abort()
            return
        if not self._first_byte:
            self._first_byte = time.monotonic()
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.usable = False
            self._finish()
        except httptools.HttpParserError as error:
            self._parser_stopped(error, data)
        else:
            if self._silent > MAX_HEAD_BYTES:
                self._fail("protocol", f"a field of the answer is larger than {MAX_HEAD_BYTES} bytes")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        self._parser = None
        if self._waiter is not None and not self._waiter.done():
            self._ended_by_close(error)

    # httptools

    def on_message_begin(self) -> None:
        if self._done:
            raise _Stop

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._silent = 0
        fields = self._trailers if self._head_done else self._headers
        fields.append((name, value))
        self._field_bytes += len(name) + len(value)
        if len(fields) > MAX_FIELDS or self._field_bytes > MAX_HEAD_BYTES:
            self._fail("protocol", f"the answer has more than {MAX_FIELDS} fields or {MAX_HEAD_BYTES} bytes of them")
            raise _Stop

    def on_headers_complete(self) -> None:
        self._silent = 0
        self._status = self._parser.get_status_code()
        self._version = "HTTP/" + self._parser.get_http_version()
        self._head_done = True
        if self._head_request and self._status >= 200:
            # llhttp cannot be told through httptools that no body follows.
            self.usable = self._keep_alive and self._parser.should_keep_alive()
            self._finish()
            raise _Stop

    def on_body(self, data: bytes) -> None:
        self._silent = 0
        self._size += len(data)
        room = self._max_body - len(self._body)
        if len(data) <= room:
            self._store(data)
        elif self._hash is None:
            self._hash = hashlib.sha256(self._body)
            self._hash.update(data)
            self._store(data[:room])
        else:
            self._hash.update(data)

    def on_message_complete(self) -> None:
        if self._done:
            return
        if 100 <= self._status < 200 and self._status != 101:
            self._put_by_interim()
            return
        self.usable = self._keep_alive and self._parser.should_keep_alive()
        self._finish()

    # Inner workings

    def _begin(self, *, head_request: bool, keep_alive: bool, max_body: int) -> None:
        self._head_request = head_request
        self._keep_alive = keep_alive
        self._max_body = max_body
        self._interim = []
        self._first_byte = 0.0
        self._ended = 0.0
        self._silent = 0
        self._field_bytes = 0
        self._body = b""
        self._size = 0
        self._hash = None
        self._done = False
        self._trailers = []
        self._begin_head()

    def _begin_head(self) -> None:
        self._head_done = False
        self._status = 0
        self._reason = b""
        self._version = ""
        self._headers = []

    def _new_parser(self) -> Any:
        parser = httptools.HttpResponseParser(self)
        # What real servers send and what no framing depends on. Everything else stays strict.
        parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_keep_alive=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )
        return parser

    def _store(self, data: bytes) -> None:
        if not self._body:
            self._body = data
            return
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += data

    def _put_by_interim(self) -> None:
        self._interim.append(Interim(self._status, self._reason, self._headers))
        if len(self._interim) > MAX_INTERIM:
            self._fail("protocol", f"more than {MAX_INTERIM} interim answers")
            raise _Stop
        self._begin_head()

    def _parser_stopped(self, error: httptools.HttpParserError, data: bytes) -> None:
        cause = error.__context__
        if not self._done:
            if cause is not None and not isinstance(cause, _Stop):
                raise cause  # a mistake of ours, not of the peer
            self._fail("protocol", f"the answer is not valid HTTP/1: {_reason(error)}")
        elif self._head_request and data.endswith((b"\r\n\r\n", b"\n\n")):
            self._parser = self._new_parser()
        else:
            self.usable = False  # bytes behind the answer's end

    def _finish(self) -> None:
        self._done = True
        self._ended = time.monotonic()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, kind: Trouble, message: str, *, stale: bool = False) -> None:
        self.usable = False
        self._ended = time.monotonic()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionTrouble(kind, message, stale=stale))

    def _ended_by_close(self, error: Exception | None) -> None:
        if self._head_done and error is None and self._is_delimited_by_close():
            self._finish()
            return
        how = "closed the connection" if error is None else f"reset the connection ({error})"
        kind: Trouble = "closed" if error is None else "reset"
        if not self._first_byte:
            self._fail(kind, f"the server {how} without an answer", stale=self.exchanges > 1)
        elif not self._head_done:
            self._fail(kind, f"the server {how} within the answer's head")
        else:
            self._fail(kind, f"the server {how} within the answer's body, after {self._size} bytes")

    def _is_delimited_by_close(self) -> bool:
        codings = [value for name, value in self._headers if name.lower() == b"transfer-encoding"]
        if codings:
            return not codings[-1].lower().rstrip().endswith(b"chunked")
        return not any(name.lower() == b"content-length" for name, _ in self._headers)


def _peer(address: Any, *, tls: str = "", alpn: str = "", sni: str = "") -> Peer:
    if not isinstance(address, tuple):
        return Peer(tls=tls, alpn=alpn, sni=sni)
    return Peer(ip=str(address[0]), port=int(address[1]), tls=tls, alpn=alpn, sni=sni)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
