"""The addon that records WebSocket messages, and the one observation that mitmproxy has no hook for: PING and PONG."""

import logging
from collections.abc import Callable, Iterator
from typing import Literal

import wsproto.connection
import wsproto.events
from mitmproxy import http, version
from mitmproxy.proxy.layers import websocket as layer
from wsproto.frame_protocol import Opcode

from megido_capture.counters import Counters, contained
from megido_capture.emitter import Emitter
from megido_capture.flows import url_of
from megido_capture.recorder import Recorder
from megido_capture.state import Registry
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.events import Peer, WebSocketMessage

logger = logging.getLogger(__name__)

TESTED = ((12, 2), (12, 3))
"""Versions of mitmproxy whose WebSocket layer the observation below was tested against."""

MAX_PAYLOAD = 3_500_000
"""Bytes of a message in its record, which travels in one piece: with a long URL it stays under the 4,000,000 bytes
that the forwarder and the topics take."""

type MessageType = Literal["TEXT", "BINARY", "PING", "PONG", "CLOSE"]


class _Connection:
    __slots__ = ("client", "connection_id", "flow_id", "keys", "sequence", "url")

    def __init__(self, flow: http.HTTPFlow, flow_id: bytes, client: Peer) -> None:
        self.flow_id = flow_id
        self.connection_id = ids.connection_id(flow_id)
        self.url = url_of(flow.request)
        self.client = client
        self.sequence = 0
        self.keys = (flow.client_conn.id, flow.server_conn.id)


class WebSockets:
    name = "megido-websocket"

    def __init__(
        self, emitter: Emitter, registry: Registry, recorder: Recorder, counters: Counters, clock: Clock
    ) -> None:
        self.counters = counters
        self.enabled = True
        self._emitter = emitter
        self._registry = registry
        self._recorder = recorder
        self._clock = clock
        self._handshakes: dict[str, bytes] = {}
        self._open: dict[str, _Connection] = {}
        self._by_peer: dict[str, tuple[_Connection, bool]] = {}

    @contained
    def response(self, flow: http.HTTPFlow) -> None:
        """Stands before the recorder, which forgets the flow here: the connection goes on under its id."""
        state = self._registry.flows.get(flow.id)
        if flow.websocket is not None and state is not None:
            self._handshakes[flow.id] = state.flow_id

    @contained
    def websocket_start(self, flow: http.HTTPFlow) -> None:
        flow_id = self._handshakes.pop(flow.id, None)
        if flow_id is None:
            return
        opened = _Connection(flow, flow_id, self._registry.client(flow.client_conn).peer)
        self._open[flow.id] = opened
        for key, from_client in zip(opened.keys, (True, False), strict=True):
            self._by_peer[key] = (opened, from_client)

    @contained
    def websocket_message(self, flow: http.HTTPFlow) -> None:
        messages = flow.websocket.messages if flow.websocket else []
        message = messages[-1]
        opened = self._open.get(flow.id)
        try:
            if opened is not None:
                kind: MessageType = "TEXT" if message.type is Opcode.TEXT else "BINARY"
                self._record(opened, message.from_client, kind, message.content)
        finally:
            del messages[:-1]  # mitmproxy would keep every message for the life of the connection

    @contained
    def websocket_end(self, flow: http.HTTPFlow) -> None:
        opened = self._open.pop(flow.id, None)
        if opened is None or flow.websocket is None:
            return
        for key in opened.keys:
            self._by_peer.pop(key, None)
        ended = flow.websocket
        self._record(
            opened,
            bool(ended.closed_by_client),
            "CLOSE",
            b"",
            close_code=int(ended.close_code or 0),
            close_reason=ended.close_reason or "",
        )

    @contained
    def control_frame(self, conn_id: str, kind: MessageType, payload: bytes) -> None:
        found = self._by_peer.get(conn_id)
        if found is not None:
            self._record(*found, kind, payload)

    def _record(
        self,
        opened: _Connection,
        from_client: bool,
        kind: MessageType,
        payload: bytes,
        *,
        close_code: int = 0,
        close_reason: str = "",
    ) -> None:
        sequence, opened.sequence = opened.sequence, opened.sequence + 1
        if not self.enabled:
            return
        cap = min(self._recorder.cap, MAX_PAYLOAD)
        self._emitter.write(
            WebSocketMessage(
                **self._emitter.terminal(self._clock.time_us()),
                message_id=ids.new_id(),
                flow_id=opened.flow_id,
                connection_id=opened.connection_id,
                url=opened.url,
                direction="SEND" if from_client else "RECEIVE",
                message_type=kind,
                payload=payload[:cap],
                size=len(payload),
                truncated=len(payload) > cap,
                sequence=sequence,
                close_code=close_code,
                close_reason=close_reason,
                client=opened.client,
            )
        )
        self.counters["websocket_messages"] += 1


def observe_control_frames(observer: Callable[[str, MessageType, bytes], None]) -> bool:
    """Calls `observer(connection id, kind, payload)` for each PING and PONG, before it is forwarded.

    mitmproxy's layer takes every event of a side from `WebsocketConnection.events`, which it inherits; that one
    method is put in between. False, and nothing is touched, on a version that this was not tested against.
    """
    found = tuple(int(part) for part in version.VERSION.split(".")[:2])
    if found not in TESTED or not hasattr(wsproto.connection.Connection, "events"):
        logger.warning("PING and PONG are not recorded: not tested with mitmproxy %s", version.VERSION)
        return False

    def events(self: layer.WebsocketConnection) -> Iterator[wsproto.events.Event]:
        for event in super(layer.WebsocketConnection, self).events():
            if isinstance(event, wsproto.events.Ping):
                observer(self.conn.id, "PING", bytes(event.payload))
            elif isinstance(event, wsproto.events.Pong):
                observer(self.conn.id, "PONG", bytes(event.payload))
            yield event

    layer.WebsocketConnection.events = events
    return True


def stop_observing() -> None:
    """Takes the observation out again: the layer inherits `events` as before."""
    if "events" in vars(layer.WebsocketConnection):
        del layer.WebsocketConnection.events
