"""What a node holds of open flows and connections, and nothing after they ended.

Kept apart from mitmproxy's flows: `flow.metadata` would be written into people's .mitm files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mitmproxy import connection, http

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.recording.errors import Cause
from megido_capture.recording.flows import client_peer, server_peer
from megido_shared.events import NO_PEER, Peer, Timing

if TYPE_CHECKING:
    from megido_capture.cache.static import Fetch
    from megido_capture.recording.tee import Tee


class ClientState:
    """One client connection."""

    __slots__ = (
        "_peer",
        "_peer_tls",
        "authenticated",
        "conn",
        "ending",
        "failures",
        "flows",
        "timed_out",
        "tls_failure",
        "tls_target",
    )

    def __init__(self, conn: connection.Client) -> None:
        self.conn = conn
        self.authenticated = b""
        """The identity of the credential that it was let in by, if it was asked for one."""
        self.ending = False
        """Why the whole connection ends has been told."""
        self.timed_out: str = ""
        self.tls_failure: str = ""
        self.tls_target: tuple[str, int] | None = None
        self.failures: list[ServerFailure] = []
        self.flows: dict[str, FlowState] = {}
        self._peer = NO_PEER
        self._peer_tls: object = self

    @property
    def peer(self) -> Peer:
        """Made once, and again when TLS was established on it."""
        if self._peer_tls is not self.conn.tls_version:
            self._peer = client_peer(self.conn)
            self._peer_tls = self.conn.tls_version
        return self._peer


class ServerFailure:
    """A failed attempt to reach an upstream; `reported` once some event has said so."""

    __slots__ = ("address", "cause", "reported", "server_id")

    def __init__(self, server_id: str, address: tuple[str, int], cause: Cause) -> None:
        self.server_id = server_id
        self.address = address
        self.cause = cause
        self.reported = False


class ServerState:
    """One upstream connection: when its steps happened (`time.monotonic`), until a first flow reports them."""

    __slots__ = ("_peer", "_peer_tls", "connect_began", "connect_us", "tls_began", "tls_us")

    def __init__(self, began: float) -> None:
        self.connect_began = began
        self.connect_us = -1
        self.tls_began = 0.0
        self.tls_us = -1
        self._peer = NO_PEER
        self._peer_tls: object = self

    def peer(self, conn: connection.Server) -> Peer:
        if self._peer_tls is not conn.tls_version:
            self._peer = server_peer(conn)
            self._peer_tls = conn.tls_version
        return self._peer

    def take(self) -> tuple[int, int]:
        """Connect and TLS time in microseconds for the first flow, -1 for those that reuse the connection."""
        taken = (self.connect_us, self.tls_us)
        self.connect_us = self.tls_us = -1
        return taken


@dataclass(frozen=True, slots=True)
class Keep:
    """What is recorded of a flow, decided when it opens: a switch that is turned while it is open leaves no half.

    `request` and `response` are how many bytes of the bodies are stored, 0 where bodies are not logged: their size and
    hash are recorded still. `message` is the same of a WebSocket message.
    """

    recorded: bool = True
    request: int = 0
    response: int = 0
    message: int = 0

    @classmethod
    def of(cls, settings: CaptureSettings) -> "Keep":
        cap = settings.max_body_size if settings.logging_enabled else 0
        return cls(
            recorded=settings.logging_enabled,
            request=cap if settings.log_request_body else 0,
            response=cap if settings.log_response_body else 0,
            message=cap,
        )


class FlowState:
    """One open flow. Times are `time.monotonic()` seconds, -1 when it has not come to that."""

    __slots__ = (
        "active",
        "announced",
        "cached",
        "client",
        "cut",
        "fetch",
        "first_byte",
        "flow",
        "flow_id",
        "keep",
        "request_tee",
        "response_tee",
        "rules",
        "sent",
        "started",
        "time_us",
    )

    def __init__(
        self, flow: http.HTTPFlow, flow_id: bytes, client: ClientState, time_us: int, started: float, *, keep: Keep
    ) -> None:
        self.flow = flow
        self.keep = keep
        self.flow_id = flow_id
        self.client = client
        self.time_us = time_us
        self.started = started
        self.active = started
        self.sent = False
        self.first_byte = -1.0
        self.announced = False
        self.cut: Cause | None = None
        self.request_tee: Tee | None = None
        self.response_tee: Tee | None = None
        self.rules: tuple[int, ...] = ()
        self.cached = False
        self.fetch: Fetch | None = None

    def timing(self, now: float, steps: tuple[int, int]) -> Timing:
        return Timing(
            connect_us=steps[0],
            tls_us=steps[1],
            first_byte_us=_us(self.first_byte - self.started) if self.first_byte >= 0 else -1,
            response_us=_us(now - self.started),
        )


class Registry:
    """Every open connection and flow of this process."""

    def __init__(self) -> None:
        self.clients: dict[str, ClientState] = {}
        self.servers: dict[str, ServerState] = {}
        self.flows: dict[str, FlowState] = {}
        """In the order in which they started."""
        self.refused: set[str] = set()
        """Flows that access control ended before anybody recorded them."""

    def client(self, conn: connection.Client) -> ClientState:
        """The state of a connection. A flow replayed inside mitmproxy has none: it gets one of its own."""
        return self.clients.get(conn.id) or ClientState(conn)

    def open(self, state: FlowState) -> None:
        self.flows[state.flow.id] = state
        state.client.flows[state.flow.id] = state

    def close(self, flow: http.HTTPFlow) -> FlowState | None:
        """The flow's state, which nobody else gets any more: whoever gets it writes the terminal event."""
        state = self.flows.pop(flow.id, None)
        if state is not None:
            state.client.flows.pop(flow.id, None)
        return state

    def older_than(self, started: float) -> Iterator[FlowState]:
        """Open flows that started before `started`, oldest first."""
        for state in self.flows.values():
            if state.started > started:
                return
            yield state


def _us(seconds: float) -> int:
    us = int(seconds * 1_000_000 + 0.5)
    return us if us > 0 else 0
