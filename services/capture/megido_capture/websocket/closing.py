"""The end of a connection whose peer may still send: it gets to read its CLOSE, and its socket is closed."""

import asyncio
import contextlib
from typing import Any, cast

from mitmproxy import connection
from mitmproxy.proxy import server

LINGER = 2.0
"""Seconds that a peer gets to read its CLOSE while it still sends."""

told: set[str] = set()
"""Ids of connections whose peer was sent a CLOSE and that have not been closed yet."""

_ending: set[asyncio.Future[None]] = set()
_original_close = server.ConnectionHandler.close_connection
_original_handle = server.ConnectionHandler.handle_connection


def put() -> None:
    setattr(server.ConnectionHandler, "handle_connection", _handle_connection)  # noqa: B010
    setattr(server.ConnectionHandler, "close_connection", _close_connection)  # noqa: B010


def take_out() -> None:
    setattr(server.ConnectionHandler, "handle_connection", _original_handle)  # noqa: B010
    setattr(server.ConnectionHandler, "close_connection", _original_close)  # noqa: B010


async def _handle_connection(handler: server.ConnectionHandler, peer: connection.Connection) -> None:
    """mitmproxy leaves the socket open when a layer closes a connection of which more has been read already: the
    cancellation then meets its lock, outside of what would close the socket."""
    try:
        await _original_handle(handler, peer)
    finally:
        told.discard(peer.id)
        left = handler.transports.get(peer)
        if left is not None and left.writer is not None:
            del handler.transports[peer]
            peer.state = connection.ConnectionState.CLOSED
            left.writer.close()


def _close_connection(handler: server.ConnectionHandler, peer: connection.Connection, half_close: bool = False) -> None:
    found = handler.transports.get(peer)
    if peer.id in told and not half_close and found is not None and found.reader and found.writer:
        told.discard(peer.id)
        found.writer = cast("Any", _Lingering(found.reader, found.writer))
    _original_close(handler, peer, half_close)


class _Lingering:
    """The writer of a connection that is closed while its peer still sends."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader = reader
        self._writer = writer

    def is_closing(self) -> bool:
        return True

    async def drain(self) -> None:
        """What is still to be written goes out while it closes."""

    def close(self) -> None:
        task = asyncio.ensure_future(_end(self._reader, self._writer))
        _ending.add(task)
        task.add_done_callback(_ending.discard)


async def _end(reader: Any, writer: Any) -> None:
    """Closes once the peer has had time to read why: at once, what it still sends would make that a reset."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER):
            writer.write_eof()
            while await reader.read(65_536):
                pass
    writer.close()
