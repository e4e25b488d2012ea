"""What stands between mitmproxy's WebSocket layer and wsproto: it sees every frame, caps messages, and lets pass what
the two would break."""

import zlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast

from mitmproxy.proxy.layers import websocket as layer
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Event, Message, Ping, Pong
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import (
    CloseReason,
    Frame,
    FrameDecoder,
    FrameProtocol,
    Opcode,
    ParseFailed,
    RsvBits,
)

MAX_FRAMES = 65_536
"""Pieces that one message may come in: empty ones would take memory without ever reaching the cap on bytes."""

UNKNOWN_CODES = frozenset({1014, *range(1016, 3000)})
"""Codes of the registry that wsproto takes for an error: 1014 is in use, the others may be assigned yet."""

type Decoder = FrameDecoder | FrameProtocol


class Observer(Protocol):
    max_message: int
    stopping: bool

    def control_frame(self, conn_id: str, kind: Literal["PING", "PONG"], payload: bytes) -> None:
        """A PING or PONG came from this connection; it has not been relayed yet."""

    def too_big(self) -> str:
        """A message grew over `max_message`, and its connection ends: the reason that its peers are told."""


def connection_class(observer: Observer, told: set[str], goodbye: str) -> type[layer.WebsocketConnection]:
    """The class of each side of a relayed connection. `told` gets the ids of connections whose peer was sent a CLOSE;
    `goodbye` is the reason in the one that is sent when `observer` is stopping."""

    class Connection(layer.WebsocketConnection):
        _held = _frames = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._proto: FrameProtocol = Frames(self.client, self._proto.extensions)

        def events(self) -> Iterator[Event]:
            if observer.stopping:
                yield CloseConnection(CloseReason.GOING_AWAY, goodbye)
                return
            for event in super().events():
                if isinstance(event, Message):
                    if self._grown_too_big(event):
                        self.frame_buf = [b""]
                        yield CloseConnection(CloseReason.MESSAGE_TOO_BIG, observer.too_big())
                        return
                elif isinstance(event, Ping):
                    observer.control_frame(self.conn.id, "PING", bytes(event.payload))
                elif isinstance(event, Pong):
                    observer.control_frame(self.conn.id, "PONG", bytes(event.payload))
                yield event

        def send(self, event: Event) -> bytes:
            if isinstance(event, CloseConnection):
                if event.code == CloseReason.ABNORMAL_CLOSURE:
                    # wsproto would send 1000: the other side would take a lost connection for a wanted end.
                    self._state = ConnectionState.CLOSED
                    return b""
                told.add(self.conn.id)
            sent: bytes = super().send(event)
            return sent

        def _grown_too_big(self, part: Message[Any]) -> bool:
            self._held += _bytes_of(part.data)
            self._frames += part.frame_finished
            if self._held > observer.max_message or self._frames > MAX_FRAMES:
                return True
            if part.message_finished:
                self._held = self._frames = 0
            return False

    return Connection


def deflate_class(observer: Observer) -> type[PerMessageDeflate]:
    """The class of the compression (RFC 7692) of each side."""

    class Deflate(PerMessageDeflate):
        """Inflates no more than a message may be: wsproto itself has no limit (64 KB become 64 MB at once).

        A control frame between the fragments of a message leaves the message's state alone; wsproto would take the
        rest for uncompressed. A window that zlib cannot deflate into is served uncompressed, as each message may be.
        """

        _inflated = 0
        _control = _uncompressed = False

        def finalize(self, offer: str) -> None:
            try:
                super().finalize(offer)
            except (ValueError, IndexError):
                self._uncompressed = self._enabled = True

        def frame_inbound_header(
            self, proto: Decoder, opcode: Opcode, rsv: RsvBits, payload_length: int
        ) -> CloseReason | RsvBits:
            self._control = opcode.iscontrol()
            if self._control:
                return RsvBits(rsv1=False, rsv2=False, rsv3=False)
            return super().frame_inbound_header(proto, opcode, rsv, payload_length)

        def frame_inbound_payload_data(self, proto: Decoder, data: bytes) -> bytes | CloseReason:
            if self._control or not self._inbound_compressed or self._decompressor is None:
                return data
            room = max(0, observer.max_message - self._inflated)
            try:
                inflated = self._decompressor.decompress(data, room + 1)
            except zlib.error:
                return CloseReason.INVALID_FRAME_PAYLOAD_DATA
            if len(inflated) > room:
                raise ParseFailed(observer.too_big(), CloseReason.MESSAGE_TOO_BIG)
            self._inflated += len(inflated)
            return inflated

        def frame_inbound_complete(self, proto: Decoder, fin: bool) -> bytes | CloseReason | None:
            if self._control:
                return None
            if fin:
                self._inflated = 0
            return super().frame_inbound_complete(proto, fin)

        def frame_outbound(
            self, proto: Decoder, opcode: Opcode, rsv: RsvBits, data: bytes, fin: bool
        ) -> tuple[RsvBits, bytes]:
            return (rsv, data) if self._uncompressed else super().frame_outbound(proto, opcode, rsv, data, fin)

    return Deflate


class Frames(FrameProtocol):
    """Reads a CLOSE whose code wsproto does not know."""

    def _process_close(self, frame: Frame) -> Frame:
        payload = cast("bytes", frame.payload)
        code = int.from_bytes(payload[:2]) if len(payload) > 1 else 0
        if code not in UNKNOWN_CODES:
            return super()._process_close(frame)
        try:
            reason = bytes(payload[2:]).decode()
        except UnicodeDecodeError as error:
            raise ParseFailed(str(error), CloseReason.INVALID_FRAME_PAYLOAD_DATA) from None
        return frame._replace(payload=(code, reason))


def _bytes_of(data: str | bytes) -> int:
    if isinstance(data, str):
        return len(data) if data.isascii() else len(data.encode())
    return len(data)
