"""The addon that bounds how long an upstream may take. mitmproxy has no connect timeout of its own."""

import asyncio
import time
from collections.abc import Callable

from mitmproxy import connection, tls
from mitmproxy.proxy import server_hooks

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_capture.recording.connections import Connections
from megido_capture.recording.errors import Cause
from megido_capture.recording.state import FlowState, Registry
from megido_shared.events import ErrorType

SLACK = 0.05

type Cut = Callable[[connection.Client, connection.Server], bool]
"""Ends an upstream connection, or the attempt to open it; False when there is none any more."""


class Timeouts:
    name = "megido-timeouts"

    def __init__(
        self,
        settings: CaptureSettings,
        registry: Registry,
        connections: Connections,
        counters: Counters,
        *,
        cut: Cut,
        silent_for: Callable[[connection.Client], float],
    ) -> None:
        self.settings = settings
        self.counters = counters
        self._registry = registry
        self._connections = connections
        self._cut = cut
        self._silent_for = silent_for
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @contained
    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """One timer over name resolution and connect, another over the TLS handshake: it may begin much later,
        when the client says hello."""
        self._arm(data, self.settings.connection_timeout)

    @contained
    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._disarm(data.server)

    @contained
    def tls_start_server(self, data: tls.TlsData) -> None:
        if isinstance(data.conn, connection.Server):
            hook_data = server_hooks.ServerConnectionHookData(server=data.conn, client=data.context.client)
            self._arm(hook_data, self.settings.connection_timeout)
            if not data.conn.state & connection.ConnectionState.CAN_READ:
                # It closed before the client said hello; mitmproxy has forgotten that and would wait for ever.
                cause = Cause(ErrorType.CONNECTION_RESET, "the server closed the connection before the TLS handshake")
                self._connections.note(data.context.client, data.conn, cause)
                asyncio.get_running_loop().call_soon(self._cut, data.context.client, data.conn)

    @contained
    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._disarm(data.server)

    @contained
    def server_disconnected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._disarm(data.server)

    @contained
    def tls_established_server(self, data: tls.TlsData) -> None:
        self._disarm(data.conn)

    def tick(self, now: float) -> None:
        """Ends flows whose upstream has been silent for `transfer_timeout` while we wait for it."""
        limit = self.settings.transfer_timeout
        if not limit:
            return
        for state in list(self._registry.older_than(now - limit)):
            waiting = state.sent and now - state.active > limit
            if waiting and state.cut is None and not self._arriving(state, limit):
                self._end(state, f"the server sent nothing for {limit} seconds (transfer_timeout)")

    def _arriving(self, state: FlowState, limit: float) -> bool:
        """Whether a body that is read whole still comes in: no hook tells of its pieces."""
        buffered = state.first_byte >= 0 and state.response_tee is None
        return buffered and self._silent_for(state.flow.client_conn) <= limit

    def _end(self, state: FlowState, message: str) -> None:
        state.cut = Cause(ErrorType.TIMEOUT, message)
        if self._cut(state.flow.client_conn, state.flow.server_conn):
            self.counters["timeouts"] += 1

    def _expire(self, data: server_hooks.ServerConnectionHookData) -> None:
        seconds = self.settings.connection_timeout
        self._timers.pop(data.server.id, None)
        if not data.server.connected:
            began = data.server.timestamp_start
            if began is None and data.client.id not in self._registry.clients:
                # Its client left while it waited: no hook says so, and nobody will open it any more.
                self._registry.servers.pop(data.server.id, None)
                return
            # None: it still waits for its turn (mitmproxy opens five connections to an address at a time), where
            # cancelling it would leave its flow without an end.
            left = seconds if began is None else seconds - (time.time() - began)
            if left > SLACK:
                self._arm(data, min(left, seconds))
                return
        step = "connection" if data.server.timestamp_tcp_setup is None else "TLS handshake"
        message = f"timed out: no {step} within {seconds} seconds (connection_timeout)"
        self._connections.note(data.client, data.server, Cause(ErrorType.TIMEOUT, message))
        if self._cut(data.client, data.server):
            self.counters["timeouts"] += 1

    def _arm(self, data: server_hooks.ServerConnectionHookData, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[data.server.id] = loop.call_later(seconds, self._expire, data)

    def _disarm(self, server: connection.Connection) -> None:
        timer = self._timers.pop(server.id, None)
        if timer is not None:
            timer.cancel()
