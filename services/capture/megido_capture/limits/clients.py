"""The addon that bounds how many clients are served at a time, and how long each may take to its next request."""

import time
from http import HTTPStatus

from mitmproxy import connection, http, tcp, tls
from mitmproxy.proxy import layer, mode_specs, server_hooks

from megido_capture.access.addresses import client_key
from megido_capture.access.farewell import Farewell, cut
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_capture.limits.client_deadlines import ClientDeadlines
from megido_capture.limits.places import FIRST, Places, Step
from megido_capture.mitm.layerkinds import is_relay, is_tls
from megido_capture.recording.connections import Connections
from megido_capture.recording.state import Registry


class Limits:
    """A client over a limit takes the place of one that makes no use of it, if there is one: the limits are on clients
    that have something in flight.

    Each step to a request has `header_timeout`, the first since the client connected, unless the server may speak first
    (transparent modes, reverse mode without HTTP). The clock stands still while the server is connected to, which has a
    deadline of its own.
    """

    name = "megido-limits"

    def __init__(
        self,
        settings: CaptureSettings,
        registry: Registry,
        connections: Connections,
        counters: Counters,
        *,
        farewell: Farewell,
        workers: int = 1,
    ) -> None:
        self.settings = settings
        self.workers = workers
        """So many processes share the limits: each has its part, rounded up."""
        self.counters = counters
        self._farewell = farewell
        self._places = places = Places(registry)
        self._deadlines = ClientDeadlines(places, registry, connections, counters, end=self._end)

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
        self._places.leave(client)

    # --- which step a client is in ---

    @contained
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        place = self._places.get(flow.client_conn.id)
        if place is not None:
            place.step = None
            place.asked = time.monotonic()

    http_connect = requestheaders

    @contained
    def http_connected(self, flow: http.HTTPFlow) -> None:
        self._begin(flow.client_conn, Step.TUNNEL)

    @contained
    def next_layer(self, data: layer.NextLayer) -> None:
        """mitmproxy has chosen by the first bytes, unless they are too few."""
        client = data.context.client
        place = self._places.get(client.id)
        if place is None or data.layer is None:
            return
        if place.step is Step.TUNNEL:
            place.step = None
        if is_tls(data.layer):
            self._begin(client, Step.HANDSHAKE)
        elif is_relay(data.layer):
            self._hold(client)

    @contained
    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        place = self._places.get(data.context.client.id)
        if place is not None:
            place.hello = data
            place.step = None  # the server is connected to first

    @contained
    def tls_start_client(self, data: tls.TlsData) -> None:
        self._begin(data.context.client, Step.HANDSHAKE)
        place = self._places.get(data.context.client.id)
        if place is not None:
            place.hello = None  # it does not pass through

    @contained
    def tls_established_client(self, data: tls.TlsData) -> None:
        self._begin(data.context.client, Step.REQUEST)

    @contained
    def tls_failed_client(self, data: tls.TlsData) -> None:
        self._begin(data.context.client, None)

    @contained
    def head_begun(self, client: connection.Client) -> None:
        """Part of a head over HTTP/1 has come."""
        place = self._places.get(client.id)
        if place is not None and place.step is Step.REQUEST:
            place.step = Step.HEAD  # and its deadline goes on
        elif place is not None and place.step is None:
            place.begin(Step.HEAD, time.monotonic())

    def tick(self, now: float) -> None:
        self._places.see_open_flows(now)
        self._deadlines.tick(now, self.settings)

    # --- who makes use of its place though it has no flow ---

    @contained
    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._hold(data.client)

    @contained
    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._let_go(data.client)
        place = self._places.get(data.client.id)
        if place is not None and place.step in FIRST:
            place.since = time.monotonic()

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
        self._begin(flow.client_conn, None)
        self._hold(flow.client_conn)

    # --- places ---

    def _admit(self, client: connection.Client) -> str:
        """Empty, or why the client is refused."""
        address = client_key(client.peername[0])
        mine = -(-self.settings.max_clients_per_address // self.workers)
        total = -(-self.settings.max_concurrent_clients // self.workers)
        if mine and self._places.count(address) >= mine and not self._make_room(address):
            self.counters["refused_clients_address"] += 1
            return f"{mine} clients from {address} are busy already (max_clients_per_address)"
        if total and len(self._places) >= total and not self._make_room():
            self.counters["refused_clients_total"] += 1
            return f"{total} clients are busy already (max_concurrent_clients)"
        place = self._places.take(client)
        place.step = _first_step(client.proxy_mode)
        return ""

    def _make_room(self, address: str = "") -> bool:
        """Tells one client to go, of those from `address` if given. False when all are busy."""
        now = time.monotonic()
        for place in self._places.least_used(now, asks=self.settings.auth_required, address=address):
            if self._end(place.conn):
                self.counters["evicted_clients"] += 1
                return True
        return False

    def _end(self, client: connection.Client) -> bool:
        """Ends a client. It has no place from now on, so nothing else here can end it, or count it, again."""
        if not cut(self._farewell.transport, client, "limit"):
            return False
        self._places.leave(client)
        return True

    def _begin(self, client: connection.Client, step: Step | None) -> None:
        place = self._places.get(client.id)
        if place is not None:
            place.step, place.since = step, time.monotonic()

    def _hold(self, client: connection.Client) -> None:
        place = self._places.get(client.id)
        if place is not None:
            place.busy += 1

    def _let_go(self, client: connection.Client) -> None:
        place = self._places.get(client.id)
        if place is not None and place.busy:
            place.busy -= 1


def _first_step(mode: mode_specs.ProxyMode) -> Step | None:
    """None where it need not be the client who begins."""
    if isinstance(mode, mode_specs.Socks5Mode):
        return Step.TUNNEL  # what comes in it, the server's greeting too, ends the step
    http = isinstance(mode, mode_specs.ReverseMode) and mode.scheme in ("http", "https")
    return Step.REQUEST if http or isinstance(mode, mode_specs.RegularMode | mode_specs.UpstreamMode) else None
