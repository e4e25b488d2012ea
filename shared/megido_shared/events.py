"""The events on the bus: tagged msgspec Structs, MessagePack maps, additive changes only.

Ids are 16 bytes (UUIDv7), times integer microseconds since the epoch in UTC, durations integer microseconds
from a monotonic clock. What came from the network stays bytes (methods, targets, header names and values,
bodies): decoding is for readers. A field with its default value is left out of the encoding.

A *terminal* record ends something that accounting counts (a flow, a WebSocket message, an error, an auth
attempt): it has `seq` > 0, counted by its node without gaps. Starts, chunks and heartbeats have `seq` 0.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import Struct

from megido_shared.bus.topics import (
    AUTH,
    ERRORS,
    FLOWS,
    NODES,
    REPLAY_COMMANDS,
    REPLAY_RESULTS,
    WEBSOCKET,
    Topic,
)

SCHEMA_VERSION = 1

type Pairs = Iterable[tuple[bytes, bytes]]

_pairs_encoder = msgspec.msgpack.Encoder()
_pairs_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, bytes]])
NO_HEADERS = msgspec.Raw(_pairs_encoder.encode([]))


def pack_headers(pairs: Pairs) -> msgspec.Raw:
    """Header pairs in order, with case and duplicates, as the MessagePack slice that events and rows hold."""
    return msgspec.Raw(_pairs_encoder.encode(pairs))


def unpack_headers(packed: bytes | msgspec.Raw) -> list[tuple[bytes, bytes]]:
    """The inverse of `pack_headers`. Raises msgspec.DecodeError on other bytes."""
    return _pairs_decoder.decode(packed)


class ErrorType(StrEnum):
    """The seven types of the founding document."""

    CONNECTION_RESET = "CONNECTION_RESET"
    TIMEOUT = "TIMEOUT"
    AUTH_FAILURE = "AUTH_FAILURE"
    PROTOCOL_ERROR = "PROTOCOL_ERROR"
    SSL_ERROR = "SSL_ERROR"
    DNS_ERROR = "DNS_ERROR"
    OTHER = "OTHER"


class Rank:
    """The total order by which records of one flow merge: a row changes only when its rank rises."""

    STARTED: ClassVar[int] = 1
    INTERRUPTED: ClassVar[int] = 2
    FAILED: ClassVar[int] = 3
    COMPLETED: ClassVar[int] = 4


class Body(Struct, omit_defaults=True, frozen=True):
    """A message body as it crossed the wire (content coding kept).

    `data` is the stored part when it travels inside the event; with `chunks` > 0 the stored part is that many
    `BodyChunk` records instead. `size` is the true size in bytes, also when less (`truncated`) or nothing is
    stored. `sha256` is over the whole body and empty when nobody computed it (then ingest does, of a complete
    inline one).
    """

    data: bytes = b""
    size: int = 0
    sha256: bytes = b""
    chunks: int = 0
    truncated: bool = False


EMPTY_BODY = Body()


class Request(Struct, omit_defaults=True, frozen=True):
    """A request as the client sent it. `target` is the raw path and query; `scheme` is http, https, ws or wss."""

    method: bytes
    scheme: str
    host: str
    port: int
    target: bytes
    authority: bytes = b""
    http_version: str = "HTTP/1.1"
    headers: msgspec.Raw = NO_HEADERS
    trailers: msgspec.Raw = NO_HEADERS
    body: Body = EMPTY_BODY


class Response(Struct, omit_defaults=True, frozen=True):
    """A response as the server sent it."""

    status: int
    reason: bytes = b""
    http_version: str = "HTTP/1.1"
    headers: msgspec.Raw = NO_HEADERS
    trailers: msgspec.Raw = NO_HEADERS
    body: Body = EMPTY_BODY


class Peer(Struct, omit_defaults=True, frozen=True):
    """One side of a connection. `tls` and `alpn` are empty in the clear; `sni` is what the client asked for."""

    ip: str = ""
    port: int = 0
    tls: str = ""
    alpn: str = ""
    sni: str = ""


NO_PEER = Peer()


class Timing(Struct, omit_defaults=True, frozen=True):
    """Durations in microseconds; -1 where it was not seen (connect and TLS on a reused connection).

    `response_us` runs from the request's start to the response's end: the API's `response_time`.
    """

    connect_us: int = -1
    tls_us: int = -1
    first_byte_us: int = -1
    response_us: int = -1


NO_TIMING = Timing()


class Failure(Struct, omit_defaults=True, frozen=True):
    """Why there is no (whole) response."""

    error_type: ErrorType
    message: str
    stack_trace: str = ""


class Event(Struct, tag_field="type", omit_defaults=True, kw_only=True, frozen=True):
    """What every event carries: its own id and the place in its node's history where it was made."""

    event_id: bytes
    node: str
    epoch: bytes
    seq: int = 0
    time_us: int
    source_app: str = ""


class _Flow(Event, kw_only=True, frozen=True):
    """What every state of a flow carries. `time_us` is when the flow started, in all of its states.

    `posted_id` is the integer id that the API already gave to a posted flow; 0 lets ingest give one.
    """

    flow_id: bytes
    request: Request
    response: Response | None = None
    client: Peer = NO_PEER
    server: Peer = NO_PEER
    timing: Timing = NO_TIMING
    is_replay: bool = False
    original_flow_id: bytes = b""
    replay_job_id: bytes = b""
    replay_position: int = -1
    posted_id: int = 0
    rules: tuple[int, ...] = ()


class FlowStarted(_Flow, tag="FlowStarted", kw_only=True, frozen=True):
    """A flow that is still open: after half a second, or before a close-delimited body's first byte. Not terminal."""


class FlowInterrupted(_Flow, tag="FlowInterrupted", kw_only=True, frozen=True):
    """A flow whose node died before it ended; what had been seen of it is here."""


class FlowFailed(_Flow, tag="FlowFailed", kw_only=True, frozen=True):
    """A flow that ended without a whole response. Ingest projects it into the errors too."""

    failure: Failure


class FlowCompleted(_Flow, tag="FlowCompleted", kw_only=True, frozen=True):
    """A request and its whole response."""

    cached: bool = False
    error_message: str = ""


class BodyChunk(Event, tag="BodyChunk", kw_only=True, frozen=True):
    """A piece of a body that is not inside its flow's event. `index` counts from 0 for each side."""

    flow_id: bytes
    side: Literal["request", "response"]
    index: int
    data: bytes


class WebSocketMessage(Event, tag="WebSocketMessage", kw_only=True, frozen=True):
    """One message of a WebSocket connection (RFC 6455). SEND is client to server.

    `payload` is the stored part, `size` the true one. A CLOSE has its code and reason beside an empty payload.
    `sequence` counts the connection's messages from 0, both directions together; those that were not recorded leave
    a gap. A connection begins with its handshake, the flow `flow_id` (status 101), and ends with one CLOSE, which is
    1005 when a peer gave no code, 1006 when the connection was lost, and 1001 when the proxy stopped.
    """

    message_id: bytes
    flow_id: bytes
    connection_id: str
    url: str
    direction: Literal["SEND", "RECEIVE"]
    message_type: Literal["TEXT", "BINARY", "PING", "PONG", "CLOSE"]
    payload: bytes = b""
    size: int = 0
    truncated: bool = False
    sequence: int = 0
    close_code: int = 0
    close_reason: str = ""
    client: Peer = NO_PEER
    posted_id: int = 0


class ErrorRaised(Event, tag="ErrorRaised", kw_only=True, frozen=True):
    """An error that has no flow of ours: a client's TLS handshake, a refused CONNECT, a posted error."""

    error_id: bytes
    failure: Failure
    url: str = ""
    client: Peer = NO_PEER
    posted_id: int = 0


class AuthAttempted(Event, tag="AuthAttempted", kw_only=True, frozen=True):
    """A decision on a client's access: credentials or address. Never holds a secret.

    `attempts` of a flood are the refused ones of about a second, from one address for one reason, or from further
    addresses (`client` is empty then). `username` is empty where they differ in it.
    """

    auth_id: bytes
    success: bool
    username: str = ""
    failure_reason: str = ""
    client: Peer = NO_PEER
    posted_id: int = 0
    attempts: int = 1


class NodeStatus(Event, tag="NodeStatus", kw_only=True, frozen=True):
    """A node's heartbeat: its state, what configuration it applies, and its counters since its start.

    `config_error` says why a published configuration is not applied. `pinned` are the fields of the configuration
    that its start decided, with their values (of a secret: "set").
    """

    state: Literal["started", "running", "stopping"]
    service: str = "capture"
    version: str = ""
    pid: int = 0
    listen: str = ""
    config_version: int = 0
    config_stale: bool = False
    pinned: dict[str, str] = {}
    counters: dict[str, int] = {}
    captured: int = 0
    config_error: str = ""


class ReplayFlows(Event, tag="ReplayFlows", kw_only=True, frozen=True):
    """Command: a replay job has items to send. A notification; the rows in Postgres are the truth."""

    job_id: bytes


class ReplayProgressed(Event, tag="ReplayProgressed", kw_only=True, frozen=True):
    """A replay item changed its state. Written before each send and after each answer.

    `deviations` of a begun one: how the request that is sent differs from the recorded one, one line each,
    `<what>: <how>`.
    """

    job_id: bytes
    position: int
    attempt: int
    state: Literal["begun", "succeeded", "failed", "timed_out"]
    flow_id: bytes = b""
    deviations: tuple[str, ...] = ()


type AnyFlow = FlowStarted | FlowInterrupted | FlowFailed | FlowCompleted
type AnyEvent = (
    FlowStarted
    | FlowInterrupted
    | FlowFailed
    | FlowCompleted
    | BodyChunk
    | WebSocketMessage
    | ErrorRaised
    | AuthAttempted
    | NodeStatus
    | ReplayFlows
    | ReplayProgressed
)

RANK: dict[type[Struct], int] = {
    FlowStarted: Rank.STARTED,
    FlowInterrupted: Rank.INTERRUPTED,
    FlowFailed: Rank.FAILED,
    FlowCompleted: Rank.COMPLETED,
}

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyEvent] = msgspec.msgpack.Decoder(AnyEvent.__value__)

encode = _encoder.encode
decode = _decoder.decode
"""`decode(bytes)` raises msgspec.ValidationError on an unknown type or shape, DecodeError on other bytes."""


def topic_of(event: AnyEvent) -> Topic:
    """The topic that an event is published on."""
    return TOPIC_OF_TYPE[type(event)]


def key_of(event: AnyEvent) -> bytes:
    """The key that an event is published under: never a host or a client, one busy host would fill a partition."""
    match event:
        case FlowStarted() | FlowInterrupted() | FlowFailed() | FlowCompleted() | BodyChunk():
            return event.flow_id
        case WebSocketMessage():
            return event.connection_id.encode()
        case ReplayFlows() | ReplayProgressed():
            return event.job_id
        case _:
            return event.node.encode()


def cloud_event_headers(event: AnyEvent) -> dict[str, bytes]:
    """CloudEvents 1.0 attributes in Kafka's binary content mode (`ce_` headers)."""
    return {
        "ce_specversion": b"1.0",
        "ce_id": event.event_id.hex().encode(),
        "ce_source": f"/megido/{event.node}".encode(),
        "ce_type": f"megido.{type(event).__name__}.v{SCHEMA_VERSION}".encode(),
        "content-type": b"application/msgpack",
    }


def type_name(raw: bytes) -> str:
    """The `type` tag of encoded bytes whose shape may be unknown to us; "" when there is none."""
    try:
        found: Any = msgspec.msgpack.decode(raw)
    except msgspec.DecodeError:
        return ""
    return str(found.get("type", "")) if isinstance(found, dict) else ""


TOPIC_OF_TYPE: dict[type[Struct], Topic] = {
    FlowStarted: FLOWS,
    FlowInterrupted: FLOWS,
    FlowFailed: FLOWS,
    FlowCompleted: FLOWS,
    BodyChunk: FLOWS,
    WebSocketMessage: WEBSOCKET,
    ErrorRaised: ERRORS,
    AuthAttempted: AUTH,
    NodeStatus: NODES,
    ReplayFlows: REPLAY_COMMANDS,
    ReplayProgressed: REPLAY_RESULTS,
}
