"""The addon that bounds how many clients are served at a time, and how long one may take to send a head."""

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

from mitmproxy import connection, http, tcp
from mitmproxy.proxy import mode_specs, server_hooks

from megido_capture.counters import Counters, contained
from megido_capture.farewell import Farewell, cut
from megido_capture.gate import client_key
from megido_capture.settings import CaptureSettings
from megido_capture.state import Registry

logger = logging.getLogger(__name__)

IDLE = 1.0
"""Seconds without a byte and without a flow after which a connection gives its place to a new client."""

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
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        self._heads.pop(flow.client_conn.id, None)

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
    def head_begun(self, client: connection.Client) -> None:
        """Part of a head has come: from now on it has `header_timeout`."""
        if client.id in self._open:
            self._heads.setdefault(client.id, (client, time.monotonic()))

    def tick(self, now: float) -> None:
        limit = self.settings.header_timeout
        for client, began in list(self._heads.values()) if limit else ():
            if now - began > limit and self._close(client):
                self.counters["header_timeouts"] += 1
                del self._heads[client.id]

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
        if isinstance(client.proxy_mode, mode_specs.RegularMode | mode_specs.UpstreamMode):
            self._heads[client.id] = (client, time.monotonic())  # nothing else may come first
        return ""

    def _make_room(self, address: str = "") -> bool:
        """Closes the connection that is idle longest. False when none is."""
        longest, found = IDLE, None
        for client in self._open.values():
            if self._busy[client.id] or (address and client_key(client.peername[0]) != address):
                continue
            state = self._registry.clients.get(client.id)
            if state is not None and not state.flows and (silent := self._silent_for(client)) >= longest:
                longest, found = silent, client
        if found is None or not self._close(found):
            return False
        self.counters["evicted_clients"] += 1
        self._forget(found)
        return True

    def _close(self, client: connection.Client) -> bool:
        return cut(self._farewell.transport, client, "limit")

    def _forget(self, client: connection.Client) -> None:
        self._heads.pop(client.id, None)
        self._busy.pop(client.id, None)
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
