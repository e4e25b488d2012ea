"""The addon that bounds how many clients are served at a time, and how long one may take to send a head."""

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

from mitmproxy import connection, http, tcp, tls
from mitmproxy.proxy import layer, mode_specs, server_hooks
from mitmproxy.proxy.layers import TCPLayer
from mitmproxy.proxy.layers.http import _http2

from megido_capture.access.farewell import Farewell, cut
from megido_capture.access.gate import client_key
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_capture.mitm.headguard import H2_SERVERS
from megido_capture.recording.errors import Cause
from megido_capture.recording.flows import content_length
from megido_capture.recording.state import Registry
from megido_shared.events import ErrorType

logger = logging.getLogger(__name__)

IDLE = 1.0
"""Seconds without a byte and without a flow after which a connection gives its place to a new client. One that keeps
sending, and no request comes of it, does so after `header_timeout`."""

BODY_PATIENCE, SLOWEST = 3, 1024
"""A body that is read whole before it is sent on has so many times `header_timeout`, and a second for so many bytes."""

READ_WHOLE = 4 << 20
"""Bytes that are read whole of a body whose length nobody has said."""

FILES_PER_CLIENT = 2
FILES_BESIDE = 200
"""Journal, segments, metrics, bus and what else is open beside the clients."""


class Limits:
    """A connection over a limit takes the place of the one that is idle longest, if one is: the limits
    are on clients that have something in flight."""

    name = "megido-limits"

    def __init__(
        self,
        settings: CaptureSettings,
        registry: Registry,
        counters: Counters,
        *,
        farewell: Farewell,
        silent_for: Callable[[connection.Client], float],
        workers: int = 1,
    ) -> None:
        self.settings = settings
        self.workers = workers
        """So many processes share the limits: each has its part, rounded up."""
        self.counters = counters
        self._registry = registry
        self._farewell = farewell
        self._silent_for = silent_for
        self._open: dict[str, connection.Client] = {}
        self._by_address: Counter[str] = Counter()
        self._busy: Counter[str] = Counter()
        """Clients with a WebSocket, a raw tunnel, or a connection that is being opened for them."""
        self._heads: dict[str, tuple[connection.Client, float]] = {}
        """Clients whose head has begun and not ended, and since when."""
        self._silent: dict[str, tuple[connection.Client, float]] = {}
        """Clients that have a tunnel and have not sent a byte into it."""
        self._timed_out: set[str] = set()
        """Clients that were closed for their head and are not gone yet: each is counted once."""
        self._hellos: dict[str, tls.ClientHelloData] = {}
        """What clients that speak TLS began with: it says whether theirs passes through, of which no hook tells."""
        self._asked: dict[str, float] = {}
        """When a client connected, or its last request began."""
        self._unfinished: dict[_http2.Http2Server, float] = {}

    async def client_connected(self, client: connection.Client) -> None:
        if client.error:
            return  # refused for its address
        try:
            why = self._admit(client)
            if why:
                client.error = why
                text = f"Megido serves no more clients now: {why}."
                await self._farewell.say(client, HTTPStatus.SERVICE_UNAVAILABLE, text, "Retry-After: 1")
        except Exception as error:  # noqa: BLE001 - a limit that fails must not stop the traffic
            self.counters.hook_failed("client_connected", error)

    @contained
    def client_disconnected(self, client: connection.Client) -> None:
        self._forget(client)

    @contained
    def http_connect(self, flow: http.HTTPFlow) -> None:
        self._heads.pop(flow.client_conn.id, None)

    @contained
    def http_connected(self, flow: http.HTTPFlow) -> None:
        if flow.client_conn.id in self._open:
            self._silent[flow.client_conn.id] = (flow.client_conn, time.monotonic())

    @contained
    def next_layer(self, data: layer.NextLayer) -> None:
        """mitmproxy has chosen by the first bytes. What follows in TLS has the deadlines of `clienttimeouts`."""
        if data.layer is not None:
            self._silent.pop(data.context.client.id, None)
        if isinstance(data.layer, TCPLayer):
            self._hold(data.context.client)

    @contained
    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        if data.context.client.id in self._open:
            self._hellos[data.context.client.id] = data

    @contained
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        client_id = flow.client_conn.id
        self._asked[client_id] = time.monotonic()
        self._heads.pop(client_id, None)

    @contained
    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._hold(data.client)

    @contained
    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._let_go(data.client)

    @contained
    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._let_go(data.client)

    @contained
    def websocket_start(self, flow: http.HTTPFlow) -> None:
        self._hold(flow.client_conn)

    @contained
    def websocket_end(self, flow: http.HTTPFlow) -> None:
        self._let_go(flow.client_conn)

    @contained
    def tcp_start(self, flow: tcp.TCPFlow) -> None:
        self._hold(flow.client_conn)

    @contained
    def tunnel_begun(self, client: connection.Client) -> None:
        """A tunnel of which no hook tells."""
        self._hold(client)

    @contained
    def head_begun(self, client: connection.Client) -> None:
        """Part of a head has come: from now on it has `header_timeout`."""
        if client.id in self._open:
            self._heads.setdefault(client.id, (client, time.monotonic()))

    def time_out(self, client: connection.Client) -> None:
        """Ends a client whose head, or handshake, has not come in time; counts it once, whoever finds it."""
        if client.id not in self._timed_out and self._close(client):
            self._timed_out.add(client.id)
            self.counters["header_timeouts"] += 1

    def tick(self, now: float) -> None:
        limit = self.settings.header_timeout
        if not limit:
            return
        # Over HTTP/2: whose frames have stopped in the middle of a head, or of what may become one.
        unfinished = {server for server in list(H2_SERVERS) if self._is_unfinished(server)}
        self._unfinished = {server: self._unfinished.get(server, now) for server in unfinished}
        waiting = [*self._heads.values(), *self._silent.values()]
        waiting += [(server.context.client, began) for server, began in self._unfinished.items()]
        for client, began in waiting:
            if now - began > limit:
                self.time_out(client)
        self._end_slow_bodies(now, limit)

    def _is_unfinished(self, server: _http2.Http2Server) -> bool:
        context = getattr(server, "context", None)  # none: it has ended, and was taken apart
        state = self._registry.clients.get(context.client.id) if context is not None else None
        if state is None:
            return False  # it has left; held here, its connection would stay in memory for ever
        frames = server.h2_conn.incoming_buffer
        return bool(frames._headers_buffer) or (bool(frames._data) and not state.flows)

    def _end_slow_bodies(self, now: float, limit: float) -> None:
        """Those that stream are nobody's place in memory, and may take as long as they like."""
        limit *= BODY_PATIENCE
        if self.settings.journal_policy == "block":
            limit += self.settings.journal_wait
        for state in list(self._registry.older_than(now - limit)):
            if state.sent or state.request_tee is not None or state.cut is not None:
                continue
            length = content_length(state.flow.request.headers)
            allowed = limit + (READ_WHOLE if length is None else length) / SLOWEST
            if now - state.started > allowed and self._close(state.flow.client_conn):
                message = f"timed out: the client has not sent the request's body within {allowed:.0f} seconds"
                state.cut = Cause(ErrorType.TIMEOUT, message)
                self.counters["body_timeouts"] += 1

    def _admit(self, client: connection.Client) -> str:
        """Empty, or why the client is refused."""
        address = client_key(client.peername[0])
        mine = -(-self.settings.max_clients_per_address // self.workers)
        total = -(-self.settings.max_concurrent_clients // self.workers)
        if mine and self._by_address[address] >= mine and not self._make_room(address):
            self.counters["refused_clients_address"] += 1
            return f"{mine} clients from {address} are busy already (max_clients_per_address)"
        if total and len(self._open) >= total and not self._make_room():
            self.counters["refused_clients_total"] += 1
            return f"{total} clients are busy already (max_concurrent_clients)"
        self._open[client.id] = client
        self._by_address[address] += 1
        self._asked[client.id] = time.monotonic()
        if isinstance(client.proxy_mode, mode_specs.RegularMode | mode_specs.UpstreamMode):
            self._heads[client.id] = (client, time.monotonic())  # nothing else may come first
        return ""

    def _make_room(self, address: str = "") -> bool:
        """Closes the connection that is idle longest. False when none is."""
        longest, found, now = IDLE, None, time.monotonic()
        for client in self._open.values():
            if self._is_busy(client) or (address and client_key(client.peername[0]) != address):
                continue
            state = self._registry.clients.get(client.id)
            if state is None or state.flows:
                continue
            idle = self._silent_for(client)
            if 0 < self.settings.header_timeout < (without := now - self._asked[client.id]):
                idle = max(idle, without)
            if idle >= longest:
                longest, found = idle, client
        if found is None or not self._close(found):
            return False
        self.counters["evicted_clients"] += 1
        self._forget(found)
        return True

    def _close(self, client: connection.Client) -> bool:
        return cut(self._farewell.transport, client, "limit")

    def _forget(self, client: connection.Client) -> None:
        for kept in (self._heads, self._silent, self._hellos, self._busy, self._asked):
            kept.pop(client.id, None)
        self._timed_out.discard(client.id)
        if self._open.pop(client.id, None) is not None:
            address = client_key(client.peername[0])
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _hold(self, client: connection.Client) -> None:
        if client.id in self._open:
            self._busy[client.id] += 1

    def _let_go(self, client: connection.Client) -> None:
        if self._busy[client.id] > 1:
            self._busy[client.id] -= 1
        else:
            self._busy.pop(client.id, None)

    def _is_busy(self, client: connection.Client) -> bool:
        hello = self._hellos.get(client.id)
        return self._busy[client.id] > 0 or (hello is not None and hello.ignore_connection)


def raise_open_files(clients: int) -> None:
    """Takes all the open files that this process may have, and warns when `clients` need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as error:
            logger.warning("the limit of %d open files cannot be raised: %s", soft, error)
    needed = clients * FILES_PER_CLIENT + FILES_BESIDE
    if clients and soft != resource.RLIM_INFINITY and soft < needed:
        logger.warning(
            "%d open files are allowed, too few for max_concurrent_clients=%d (about %d): raise `ulimit -n`",
            soft,
            clients,
            needed,
        )
