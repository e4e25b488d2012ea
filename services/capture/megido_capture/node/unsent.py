"""What clients have not been sent yet of answers whose flows have ended."""

import asyncio
import socket
import struct
from weakref import WeakSet

from mitmproxy import connection

from megido_capture.counters import Counters, contained
from megido_capture.mitm.flowcontrol import unsent_frames
from megido_capture.mitm.handlers import Handlers

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, zero seconds."""


class Unsent:
    """An addon that knows every client's socket until it is closed, also when mitmproxy has let it go: a flow's end is
    recorded before its client has the answer, and a slow reader's may wait in the socket's buffer for long."""

    name = "megido-unsent"

    def __init__(self, handlers: Handlers, counters: Counters) -> None:
        self.counters = counters
        self._handlers = handlers
        self._sockets: WeakSet[asyncio.Transport] = WeakSet()

    @contained
    def client_connected(self, client: connection.Client) -> None:
        if (transport := self._transport(client)) is not None:
            self._sockets.add(transport)

    def of(self, client: connection.Client) -> int:
        """Bytes that a client's socket, or its HTTP/2 windows, have not taken."""
        transport = self._transport(client)
        return unsent_frames(client) + (transport.get_write_buffer_size() if transport is not None else 0)

    def total(self) -> int:
        """Bytes that no socket has taken yet."""
        return sum(transport.get_write_buffer_size() for transport in self._sockets)

    def reset(self) -> int:
        """Ends the connections whose clients are owed something, by a reset: an end would make half an answer without
        a length look whole. Returns how many there are, and counts them."""
        owed = [transport for transport in self._sockets if transport.get_write_buffer_size()]
        for transport in owed:
            self.counters["answers_cut_by_stop"] += 1
            if (found := transport.get_extra_info("socket")) is not None:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        return len(owed)

    def _transport(self, client: connection.Client) -> asyncio.Transport | None:
        io = self._handlers.transport(client)
        found = getattr(io.writer, "transport", None) if io is not None else None
        return found if isinstance(found, asyncio.Transport) else None
