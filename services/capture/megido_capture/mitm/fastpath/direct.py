"""Data of a TCP connection is handled where the transport brings it: no copy through a stream reader, no turn of the
loop and no task to wake for each piece.

`handle_connection`, mitmproxy's own loop for a connection, stays: it gets a reader whose `read` returns only when
there is nothing more to read, and while it waits everything that comes is handled. So how a connection ends, its
cancellation and what may still be sent afterwards are mitmproxy's as before.

Backpressure is kept too: as in `drain_writers`, no connection is read on while any of the same client has more to
write than its transport takes.
"""

import asyncio
from typing import TYPE_CHECKING, Any, cast

from mitmproxy.connection import Connection
from mitmproxy.proxy.events import DataReceived

if TYPE_CHECKING:
    from megido_capture.mitm.fastpath.handler import Handler

READ_AT_MOST = 65_535
"""Bytes in one event, as many as mitmproxy reads."""

_buffer = bytearray(READ_AT_MOST)
"""One for all connections: what is in it is handled, or copied, before the transport returns to the loop."""
_view = memoryview(_buffer)


def take_over(handler: "Handler", connection: Connection) -> "Reader | None":
    """Makes the reader of a connection ours, unless it is none of asyncio's streams (UDP, WireGuard, uvloop)."""
    io = handler.transports[connection]
    if type(io.reader) is not asyncio.StreamReader or type(io.writer) is not asyncio.StreamWriter:
        return None
    if not isinstance(io.writer.transport, asyncio.Transport):
        return None
    # The same object, because asyncio's own protocol of the connection knows it.
    io.reader.__class__ = Reader
    reader = cast("Reader", io.reader)
    reader.begin(handler, connection, io.writer.transport)
    return reader


class Throttle:
    """The connections of one client: while one cannot write as fast as it should, none is read on."""

    def __init__(self) -> None:
        self._full: set[_Protocol] = set()
        self._held: list[asyncio.Transport] = []

    def is_on(self) -> bool:
        return bool(self._full)

    def hold(self, transport: asyncio.Transport) -> None:
        transport.pause_reading()  # also when it is held: somebody else may have let it go on
        if transport not in self._held:
            self._held.append(transport)

    def full(self, writer: "_Protocol") -> None:
        self._full.add(writer)

    def drained(self, writer: "_Protocol") -> None:
        self._full.discard(writer)
        if not self._full:
            held, self._held = self._held, []
            for transport in held:
                transport.resume_reading()

    def let_go(self, transport: asyncio.Transport) -> None:
        if transport in self._held:
            self._held.remove(transport)
            transport.resume_reading()


class Reader(asyncio.StreamReader):
    """The `StreamReader` of a connection. It cannot be made, only become."""

    _handler: "Handler"
    _connection: Connection
    _direct: "_Protocol | None"
    _buffer: bytearray

    def begin(self, handler: "Handler", connection: Connection, transport: asyncio.Transport) -> None:
        self._handler = handler
        self._connection = connection
        self._transport = transport
        self._direct = None

    async def read(self, n: int = -1) -> bytes:
        """Handles what comes until there is nothing more; then, and before, it reads as a stream does."""
        transport = self._transport
        if self._direct is not None or self._buffer or self.at_eof() or self.exception() or transport.is_closing():
            return await super().read(n)
        streams = transport.get_protocol()
        self._direct = direct = _Protocol(self._handler, self._connection, transport, streams)
        transport.set_protocol(direct)
        if getattr(streams, "_paused", False):
            self._handler.throttle.full(direct)  # what was written before we came will not be told again
        try:
            await direct.ended
        except asyncio.CancelledError:
            # It is being closed. What still comes is for whoever reads on, so that the peer can read its end.
            transport.set_protocol(streams)
            self.release()
            raise
        return await super().read(n)

    def release(self) -> None:
        """The connection is not the client's any more: its unwritten data holds nobody up."""
        if self._direct is not None:
            self._handler.throttle.drained(self._direct)
            self._handler.throttle.let_go(self._transport)


class _Protocol(asyncio.BufferedProtocol):
    """Tells `streams`, asyncio's own protocol of the connection, everything but the data."""

    def __init__(self, handler: "Handler", connection: Connection, transport: asyncio.Transport, streams: Any) -> None:
        self._handler = handler
        self._connection = connection
        self._transport = transport
        self._streams = streams
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _view

    def buffer_updated(self, nbytes: int) -> None:
        if self.ended.done():
            return  # cancelled in this turn of the loop
        handler = self._handler
        handler.handle(DataReceived(self._connection, bytes(_view[:nbytes])))
        if handler.throttle.is_on():
            handler.throttle.hold(self._transport)

    def eof_received(self) -> bool:
        self._end()
        return bool(self._streams.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._streams.connection_lost(exc)
        self._handler.throttle.drained(self)
        self._end()
        # Its task may wait to send what can never be sent. mitmproxy notices by writing; we are told.
        io = self._handler.transports.get(self._connection)
        if io is not None and io.handler is not None:
            io.handler.cancel("connection lost")

    def pause_writing(self) -> None:
        self._handler.throttle.full(self)
        self._streams.pause_writing()

    def resume_writing(self) -> None:
        self._streams.resume_writing()
        self._handler.throttle.drained(self)

    def _end(self) -> None:
        """Told at once as well: it must not fall behind what comes from the other side in the same turn."""
        if not self.ended.done():  # else cancelled in this turn of the loop
            self.ended.set_result(None)
            self._handler.closed_by_peer(self._connection)
