"""A slow reader holds up whoever sends to it, over HTTP/2 too, and nobody else.

mitmproxy opens HTTP/2 windows of 2 GB, acknowledges what comes at once and keeps what the other side's window does not
let through: a client that does not read one stream makes it hold that whole body. Over HTTP/1 the socket is full and
the sender waits. Here the windows are bounded, and a streamed body whose receiver has `FULL` bytes to go is not
acknowledged (from HTTP/2), or its connection not read (from HTTP/1), until there is room again.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import h2.connection
from mitmproxy import connection, http
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import HttpLayer
from mitmproxy.proxy.layers.http._events import RequestData
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Connection, Http2Server
from mitmproxy.proxy.layers.http._http_h2 import BufferedH2Connection

type Side = Literal["request", "response"]

STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
"""Bytes that a peer may send before we acknowledge some: on one stream, and on all of a connection."""

FULL = 256 * 1024
"""Bytes waiting for a receiver above which its sender is held up."""

PAUSE = 0.02
"""Seconds until a sender that is held up is looked at again."""

_original_window = BufferedH2Connection.__init__
_original_initiate = BufferedH2Connection.initiate_connection
_original_server = Http2Server._handle_event
_original_client = Http2Client._handle_event

_layers: WeakValueDictionary[str, Http2Connection] = WeakValueDictionary()
"""By the id of the connection that speaks HTTP/2."""

type Room = Callable[[], bool]


class _LookAgain(commands.RequestWakeup):
    """Ours, not the layer's own wake-up for its pings."""


class FlowControl:
    """`connections` are mitmproxy's handlers by the id of their client."""

    def __init__(self, connections: Mapping[Any, Any]) -> None:
        self._connections = connections
        self._paused: set[asyncio.Transport] = set()

    def passing(self, flow: http.HTTPFlow, side: Side) -> Callable[[], None] | None:
        """To be called with each piece of a streamed body; None where the sockets do it."""
        if flow.client_conn.alpn != b"h2" or (client := _layers.get(flow.client_conn.id)) is None:
            return None
        layer = _http_layer(client)
        number = next((key for key, stream in layer.streams.items() if getattr(stream, "flow", None) is flow), None)
        if number is None:
            return None
        return partial(self._passing, flow, side, number)

    def _passing(self, flow: http.HTTPFlow, side: Side, number: int) -> None:
        ends: tuple[connection.Connection, connection.Connection] = (flow.client_conn, flow.server_conn)
        source, receiver = ends if side == "request" else ends[::-1]
        room = partial(self._has_room, flow.client_conn, receiver, number)
        if room():
            return
        layer = _layers.get(source.id)
        if layer is not None:
            layer.withheld[_own(layer, number)] = room  # type: ignore[attr-defined]
        elif (transport := self._transport(flow.client_conn, source)) is not None:
            transport.pause_reading()
            if transport not in self._paused:
                self._paused.add(transport)
                self._look_again(transport, room)

    def _look_again(self, transport: asyncio.Transport, room: Room) -> None:
        if transport.is_closing():
            self._paused.discard(transport)
        elif room():
            self._paused.discard(transport)
            transport.resume_reading()
        else:
            asyncio.get_running_loop().call_later(PAUSE, self._look_again, transport, room)

    def _has_room(self, client: connection.Client, receiver: connection.Connection, number: int) -> bool:
        layer = _layers.get(receiver.id)
        if layer is not None:
            return _waiting(layer, number) <= FULL
        transport = self._transport(client, receiver)
        if transport is None:
            return True
        # mitmproxy stops reading the whole connection at the usual limit: other streams would wait too.
        transport.set_write_buffer_limits(high=4 * STREAM_WINDOW)
        return transport.get_write_buffer_size() <= FULL

    def _transport(self, client: connection.Client, conn: connection.Connection) -> asyncio.Transport | None:
        handler = self._connections.get(client.id)
        found = handler.transports.get(conn) if handler is not None else None
        transport = getattr(found.writer, "transport", None) if found is not None else None
        return transport if isinstance(transport, asyncio.Transport) else None


def control_flow(connections: Mapping[Any, Any]) -> FlowControl:
    """Puts the bounds into mitmproxy's HTTP/2 layers."""
    _put(_window, _initiate, _watched(_original_server), _watched(_original_client))
    return FlowControl(connections)


def stop_controlling() -> None:
    """Takes them out again."""
    _put(_original_window, _original_initiate, _original_server, _original_client)


def _put(window: Any, initiate: Any, server: Any, client: Any) -> None:
    for owner, name, function in (
        (BufferedH2Connection, "__init__", window),
        (BufferedH2Connection, "initiate_connection", initiate),
        (Http2Server, "_handle_event", server),
        (Http2Client, "_handle_event", client),
    ):
        setattr(owner, name, function)


def _begin(self: Any) -> None:
    """Adds to an HTTP/2 layer that starts what `_watched` needs."""
    _layers[self.conn.id] = self
    self.withheld = {}  # by our number of a stream: whether its receiver has room
    self.unacknowledged = {}
    self.looks_again = False
    acknowledge = self.h2_conn.acknowledge_received_data

    def withhold(size: int, number: int) -> None:
        if number in self.withheld:
            self.unacknowledged[number] = self.unacknowledged.get(number, 0) + size
        else:
            acknowledge(size, number)

    self.h2_conn.acknowledge_received_data = withhold


def _window(self: BufferedH2Connection, config: Any) -> None:
    _original_window(self, config)
    self.local_settings.initial_window_size = STREAM_WINDOW
    self.local_settings.acknowledge()


def _initiate(self: BufferedH2Connection) -> None:
    h2.connection.H2Connection.initiate_connection(self)
    self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)


def _watched(original: Callable[[Any, events.Event], CommandGenerator[None]]) -> Any:
    def _handle_event(self: Any, event: events.Event) -> CommandGenerator[None]:
        if isinstance(event, events.Start):
            _begin(self)
        if isinstance(event, events.Wakeup) and isinstance(event.command, _LookAgain):
            self.looks_again = False
            yield from _release(self)
        else:
            yield from original(self, event)
        if self.withheld and not self.looks_again:
            self.looks_again = True
            yield _LookAgain(PAUSE)

    return _handle_event


def _release(layer: Any) -> CommandGenerator[None]:
    """Acknowledges what may come again."""
    for number in [number for number, room in layer.withheld.items() if room()]:
        del layer.withheld[number]
        if size := layer.unacknowledged.pop(number, 0):
            layer.h2_conn.acknowledge_received_data(size, number)
    if data := layer.h2_conn.data_to_send():
        yield commands.SendData(layer.conn, data)


def unsent_frames(client: connection.Client) -> int:
    """Bytes that a client's HTTP/2 windows do not let through."""
    layer = _layers.get(client.id)
    if layer is None:
        return 0
    return sum(len(piece.data) for pieces in layer.h2_conn.stream_buffers.values() for piece in pieces)


def _http_layer(layer: Http2Connection) -> HttpLayer:
    return next(found for found in reversed(layer.context.layers) if isinstance(found, HttpLayer))


def _own(layer: Http2Connection, number: int) -> int:
    """A stream of the client's as this connection numbers it; -1 when it does not yet."""
    return layer.our_stream_id.get(number, -1) if isinstance(layer, Http2Client) else number


def _waiting(layer: Http2Connection, number: int) -> int:
    """Bytes of a stream that the peer's window does not let through."""
    buffered = layer.h2_conn.stream_buffers.get(_own(layer, number), ())
    size = sum(len(piece.data) for piece in buffered)
    if isinstance(layer, Http2Client) and number in layer.stream_queue:
        size += sum(len(event.data) for event in layer.stream_queue[number] if isinstance(event, RequestData))
    return size
