"""The addon that records WebSocket messages, and what mitmproxy has no hook for: PING, PONG and a cap on messages."""

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Iterator
from typing import Any, Literal, cast

import wsproto.events
import wsproto.extensions
from mitmproxy import connection, http, version
from mitmproxy.proxy import server
from mitmproxy.proxy.layers import websocket as layer
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, ParseFailed

from megido_capture.counters import Counters, contained
from megido_capture.emitter import Emitter
from megido_capture.flows import url_of
from megido_capture.recorder import Recorder
from megido_capture.state import Registry
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.config_fields import DEFAULT_MAX_MESSAGE
from megido_shared.events import Peer, WebSocketMessage

logger = logging.getLogger(__name__)

TESTED = ((12, 2), (12, 3))
"""Versions of mitmproxy whose WebSocket layer `observe` was tested against."""

MAX_PAYLOAD = 3_500_000
"""Bytes of a message in its record, which travels in one piece: with a long URL it stays under the 4,000,000 bytes
that the forwarder and the topics take."""

MAX_FRAMES = 65_536
"""Pieces that one message may come in: empty ones would take memory without ever reaching the cap on bytes."""

LINGER = 2.0
"""Seconds that a peer gets to read its CLOSE while it still sends."""

_ending: set[asyncio.Future[None]] = set()
_refused: set[str] = set()
_original_close = server.ConnectionHandler.close_connection
_original_handle = server.ConnectionHandler.handle_connection
_LayerConnection = layer.WebsocketConnection
_WsprotoDeflate = PerMessageDeflate

type Decoder = FrameDecoder | FrameProtocol
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
        self.max_message = DEFAULT_MAX_MESSAGE
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
        if flow.websocket is not None and state is not None and state.keep.recorded:
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

    def too_big(self) -> str:
        """Counts a message over the cap; the reason that both sides are told."""
        self.counters["websocket_too_big"] += 1
        return f"a message over {self.max_message} bytes"

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
        cap = min(self._recorder.keep.message, MAX_PAYLOAD)
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


def observe(sockets: WebSockets) -> bool:
    """Puts two classes of ours between mitmproxy's WebSocket layer and wsproto, which both make their objects from a
    name in a module. Each PING and PONG is told to `sockets`, and a message that grows past `sockets.max_message`
    ends the connection with 1009, before it is held. False, and nothing is touched, on a version that this was not
    tested against."""
    found = tuple(int(part) for part in version.VERSION.split(".")[:2])
    if found not in TESTED:
        logger.warning(
            "PING and PONG are not recorded and websocket_max_message is without effect: not tested with mitmproxy %s",
            version.VERSION,
        )
        return False

    class Connection(_LayerConnection):
        _held = _frames = 0

        def events(self) -> Iterator[wsproto.events.Event]:
            for event in super().events():
                if isinstance(event, wsproto.events.Message):
                    self._held += _bytes_of(event.data)
                    self._frames += event.frame_finished
                    if self._held > sockets.max_message or self._frames > MAX_FRAMES:
                        self.frame_buf = [b""]
                        _refused.add(self.conn.id)
                        yield wsproto.events.CloseConnection(CloseReason.MESSAGE_TOO_BIG, sockets.too_big())
                        return
                    if event.message_finished:
                        self._held = self._frames = 0
                elif isinstance(event, wsproto.events.CloseConnection) and event.code == CloseReason.MESSAGE_TOO_BIG:
                    _refused.add(self.conn.id)
                elif isinstance(event, wsproto.events.Ping):
                    sockets.control_frame(self.conn.id, "PING", bytes(event.payload))
                elif isinstance(event, wsproto.events.Pong):
                    sockets.control_frame(self.conn.id, "PONG", bytes(event.payload))
                yield event

    class Deflate(_WsprotoDeflate):
        """Inflates no more than a message may be: wsproto itself has no limit (64 KB become 64 MB at once)."""

        _inflated = 0

        def frame_inbound_payload_data(self, proto: Decoder, data: bytes) -> bytes | CloseReason:
            if not self._inbound_compressed or not self._inbound_is_compressible or self._decompressor is None:
                return data
            room = max(0, sockets.max_message - self._inflated)
            try:
                inflated = self._decompressor.decompress(data, room + 1)
            except zlib.error:
                return CloseReason.INVALID_FRAME_PAYLOAD_DATA
            if len(inflated) > room:
                raise ParseFailed(sockets.too_big(), CloseReason.MESSAGE_TOO_BIG)
            self._inflated += len(inflated)
            return inflated

        def frame_inbound_complete(self, proto: Decoder, fin: bool) -> bytes | CloseReason | None:
            if fin and self._inbound_is_compressible:
                self._inflated = 0
            return super().frame_inbound_complete(proto, fin)

    _put(Connection, Deflate)
    setattr(server.ConnectionHandler, "handle_connection", _handle_connection)  # noqa: B010
    setattr(server.ConnectionHandler, "close_connection", _close_connection)  # noqa: B010
    return True


def stop_observing() -> None:
    """Takes our classes out again."""
    _put(_LayerConnection, _WsprotoDeflate)
    setattr(server.ConnectionHandler, "handle_connection", _original_handle)  # noqa: B010
    setattr(server.ConnectionHandler, "close_connection", _original_close)  # noqa: B010


async def _handle_connection(handler: server.ConnectionHandler, peer: connection.Connection) -> None:
    """mitmproxy leaves the socket open when a layer closes a connection of which more has been read already: the
    cancellation then meets its lock, outside of what would close the socket."""
    try:
        await _original_handle(handler, peer)
    finally:
        left = handler.transports.get(peer)
        if left is not None and left.writer is not None:
            del handler.transports[peer]
            peer.state = connection.ConnectionState.CLOSED
            left.writer.close()


def _close_connection(handler: server.ConnectionHandler, peer: connection.Connection, half_close: bool = False) -> None:
    found = handler.transports.get(peer)
    if peer.id in _refused and not half_close and found is not None and found.reader and found.writer:
        _refused.discard(peer.id)
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


def _put(relayed: type[layer.WebsocketConnection], deflate: type[PerMessageDeflate]) -> None:
    setattr(layer, "WebsocketConnection", relayed)  # noqa: B010 - mypy refuses an assignment to a class
    setattr(wsproto.extensions, "PerMessageDeflate", deflate)  # noqa: B010


def _bytes_of(data: str | bytes) -> int:
    if isinstance(data, str):
        return len(data) if data.isascii() else len(data.encode())
    return len(data)
