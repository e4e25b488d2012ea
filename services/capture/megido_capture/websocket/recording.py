"""The addon that records a WebSocket connection: each message, each PING and PONG, and one CLOSE at its end."""

import asyncio
import time
from collections.abc import Callable
from typing import Literal
from weakref import WeakKeyDictionary

from mitmproxy import connection, http, websocket
from mitmproxy.proxy.layers.websocket import WebSocketMessageInjected
from wsproto.frame_protocol import CloseReason, Opcode

from megido_capture.counters import Counters, contained
from megido_capture.recording.emitter import Emitter
from megido_capture.recording.flows import url_of
from megido_capture.recording.recorder import Recorder
from megido_capture.recording.state import Registry
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.config_fields import DEFAULT_MAX_MESSAGE
from megido_shared.events import Peer, WebSocketMessage

MAX_PAYLOAD = 3_500_000
"""Bytes of a message in its record, which travels in one piece: with a long URL it stays under the 4,000,000 bytes
that the forwarder and the topics take."""

STOPPING = "the proxy stops"

type MessageType = Literal["TEXT", "BINARY", "PING", "PONG", "CLOSE"]
type Inject = Callable[[WebSocketMessageInjected], None]


class _Connection:
    __slots__ = ("client", "connection_id", "flow", "flow_id", "keys", "recorded", "sequence", "url")

    def __init__(self, flow: http.HTTPFlow, flow_id: bytes, client: Peer) -> None:
        self.flow = flow
        self.flow_id = flow_id
        self.connection_id = ids.connection_id(flow_id)
        self.url = url_of(flow.request)
        self.client = client
        self.recorded = False
        """Something of it is in the journal, so its CLOSE must be: the next start would take it for a cut one."""
        self.sequence = 0
        self.keys = (flow.client_conn.id, flow.server_conn.id)


class WebSockets:
    """A connection begins with the flow of its handshake (status 101) and ends with exactly one CLOSE: the one that a
    peer sent (1005 when it named no code), 1002, 1007 or 1009 for what a peer sent against the rules, 1006 when its TCP
    connection ended without one, 1001 when the proxy stopped. `direction` is whose doing it was.

    While `enabled` is false nothing is recorded but the end of what was recorded before, and the sequence numbers go
    on, so that a gap shows.
    """

    name = "megido-websocket"

    def __init__(
        self, emitter: Emitter, registry: Registry, recorder: Recorder, counters: Counters, clock: Clock
    ) -> None:
        self.counters = counters
        self.enabled = True
        self.max_message = DEFAULT_MAX_MESSAGE
        self.stopping = False
        self.cutting = False
        """The node cuts its clients: what ends from now on ends by its doing."""
        self._emitter = emitter
        self._registry = registry
        self._recorder = recorder
        self._clock = clock
        self._handshakes: WeakKeyDictionary[http.HTTPFlow, bytes] = WeakKeyDictionary()
        self._open: dict[str, _Connection] = {}
        self._by_peer: dict[str, tuple[_Connection, bool]] = {}

    @contained
    def response(self, flow: http.HTTPFlow) -> None:
        """Stands before the recorder, which forgets the flow here: the connection goes on under its id."""
        if flow.websocket is None:
            return
        state = self._registry.flows.get(flow.id)
        if state is not None and state.keep.recorded:
            self._handshakes[flow] = state.flow_id

    @contained
    def websocket_start(self, flow: http.HTTPFlow) -> None:
        flow_id = self._handshakes.pop(flow, None)
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
    def control_frame(self, conn_id: str, kind: MessageType, payload: bytes) -> None:
        """A PING or PONG of the peer whose connection has this id: mitmproxy has no hook for them."""
        found = self._by_peer.get(conn_id)
        if found is not None:
            self._record(*found, kind, payload)

    @contained
    def websocket_end(self, flow: http.HTTPFlow) -> None:
        opened, ended = self._open.get(flow.id), flow.websocket
        if opened is not None and ended is not None:
            self._close(opened, bool(ended.closed_by_client), int(ended.close_code or 0), ended.close_reason or "")

    @contained
    def client_disconnected(self, client: connection.Client) -> None:
        """The last that is heard of a connection: without an end, something in mitmproxy's relay has failed."""
        opened, from_client = self._by_peer.get(client.id, (None, False))
        if opened is not None:
            self._close(opened, from_client, CloseReason.ABNORMAL_CLOSURE, "")

    async def end_all(self, inject: Inject, deadline: float) -> None:
        """Ends what is open with 1001, to both sides, which have until `deadline` (`time.monotonic()`) to answer."""
        self.stopping = True
        for opened in list(self._open.values()):
            nothing = websocket.WebSocketMessage(Opcode.TEXT, False, b"")
            try:
                inject(WebSocketMessageInjected(opened.flow, nothing))
            except ValueError:  # its client is gone
                self._close(opened, True, CloseReason.ABNORMAL_CLOSURE, "")
        while self._open and time.monotonic() < deadline:  # noqa: ASYNC110 - hooks end them
            await asyncio.sleep(0.01)

    def give_up(self) -> None:
        """Records the end of what is open still, once its connections are cut."""
        for opened in list(self._open.values()):
            self._close(opened, False, CloseReason.ABNORMAL_CLOSURE, STOPPING)

    def too_big(self) -> str:
        """Counts a message over the cap; the reason that both sides are told."""
        self.counters["websocket_too_big"] += 1
        return f"a message over {self.max_message} bytes"

    def _close(self, opened: _Connection, from_client: bool, code: int, reason: str) -> None:
        if self.cutting:
            from_client, code, reason = False, CloseReason.ABNORMAL_CLOSURE, STOPPING
        del self._open[opened.flow.id]
        for key in opened.keys:
            self._by_peer.pop(key, None)
        self._record(opened, from_client, "CLOSE", b"", close_code=int(code), close_reason=reason)

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
        if not (self.enabled or (kind == "CLOSE" and opened.recorded)):
            return
        opened.recorded = True
        cap = min(self._recorder.keep.message, MAX_PAYLOAD)
        self._emitter.write(
            WebSocketMessage(
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
                **self._emitter.terminal(self._clock.time_us()),  # last: a number that is given must be written
            )
        )
        self.counters["websocket_messages"] += 1
