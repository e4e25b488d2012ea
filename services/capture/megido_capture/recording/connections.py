"""The addon that watches connections: durations, causes of failure, and errors that have no flow."""

import sys
import time
from dataclasses import replace

from mitmproxy import connection, http, tls
from mitmproxy.proxy import server_hooks

from megido_capture.counters import Counters, contained
from megido_capture.recording.emitter import Emitter
from megido_capture.recording.errors import Cause, cause_of_exception, cause_of_message, failure, remedy
from megido_capture.recording.floods import Flood
from megido_capture.recording.flows import url_from
from megido_capture.recording.recorder import Recorder
from megido_capture.recording.state import ClientState, Registry, ServerFailure, ServerState
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.events import ErrorRaised, ErrorType

KEPT_FAILURES = 32
"""A client that keeps one connection open and names ever new hosts must not fill memory."""


class Connections:
    """Notes only; a flow's own end, `http_connect_error` or the disconnect writes the one event of an attempt."""

    name = "megido-connections"

    def __init__(
        self, emitter: Emitter, registry: Registry, recorder: Recorder, counters: Counters, clock: Clock
    ) -> None:
        self.counters = counters
        self._emitter = emitter
        self._registry = registry
        self._recorder = recorder
        self._clock = clock
        self._flood = Flood(time.monotonic())

    @contained
    def client_connected(self, client: connection.Client) -> None:
        self._registry.clients[client.id] = ClientState(client)

    @contained
    def client_disconnected(self, client: connection.Client) -> None:
        state = self._registry.clients.pop(client.id, None)
        if state is None:
            return
        if state.flows:
            self._recorder.client_gone(list(state.flows.values()))
        if state.timed_out and not state.ending:
            self._raise_bounded(state, Cause(ErrorType.TIMEOUT, state.timed_out), self._intended_url(state))
            return
        if state.tls_failure:
            self._raise_bounded(state, Cause(ErrorType.SSL_ERROR, state.tls_failure), self._intended_url(state))
            return
        for noted in state.failures:
            if not noted.reported:
                self._raise(state, noted.cause, self._url(noted.address))

    @contained
    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._registry.servers[data.server.id] = ServerState(time.monotonic())

    @contained
    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        state = self._registry.servers.get(data.server.id)
        if state is not None:
            state.connect_us = _us_since(state.connect_began)
        client = self._registry.clients.get(data.client.id)
        if client is not None and client.failures:
            client.failures = [noted for noted in client.failures if noted.address != data.server.address]

    @contained
    def server_connect_error(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._registry.servers.pop(data.server.id, None)
        message = data.server.error or "connection failed"
        # mitmproxy calls this hook inside its `except`: the exception says more than its text.
        error = sys.exception()
        cause = cause_of_exception(error, message) if isinstance(error, OSError) else cause_of_message(message)
        self.note(data.client, data.server, cause)

    @contained
    def server_disconnected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._registry.servers.pop(data.server.id, None)

    @contained
    def tls_start_server(self, data: tls.TlsData) -> None:
        state = self._registry.servers.get(data.conn.id)
        if state is not None:
            state.tls_began = time.monotonic()

    @contained
    def tls_established_server(self, data: tls.TlsData) -> None:
        state = self._registry.servers.get(data.conn.id)
        if state is not None:
            state.tls_us = _us_since(state.tls_began)

    @contained
    def tls_failed_server(self, data: tls.TlsData) -> None:
        message = data.conn.error or "TLS handshake failed"
        if isinstance(data.conn, connection.Server):
            self.note(data.context.client, data.conn, Cause(ErrorType.SSL_ERROR, message))

    @contained
    def tls_failed_client(self, data: tls.TlsData) -> None:
        client = self._registry.clients.get(data.context.client.id)
        if client is not None:
            name = data.context.client.sni or (data.context.server.address or ("unknown host", 0))[0]
            error = data.conn.error or "no reason given"
            client.tls_failure = f"TLS handshake with the client failed for {name}: {error}{remedy(error, name)}"
            if data.context.server.address:
                client.tls_target = data.context.server.address

    @contained
    def client_timed_out(self, conn: connection.Client, message: str) -> None:
        """A client that is cut in its TLS handshake or within a head: told when its connection ends."""
        self._registry.client(conn).timed_out = message

    @contained
    def http_connect_error(self, flow: http.HTTPFlow) -> None:
        if flow.id in self._registry.refused:
            self._registry.refused.discard(flow.id)  # one auth event has said it already
            return
        client = self._registry.client(flow.client_conn)
        address = (flow.request.data.host, flow.request.data.port)
        for noted in reversed(client.failures):
            if noted.address == address or flow.server_conn.error == noted.cause.message:
                noted.reported = True
                self._raise(client, noted.cause, self._url(address))
                return
        status = flow.response.status_code if flow.response else 0
        self._raise(client, cause_of_message(f"CONNECT was answered with {status}"), self._url(address))

    def note(self, client: connection.Client, server: connection.Server, cause: Cause) -> None:
        """Remembers why an attempt failed. The first cause of a connection is the true one: what our own timer
        cut reports a cancelled connection or a broken handshake too."""
        state = self._registry.clients.get(client.id)
        if state is None or server.address is None:
            return
        if any(noted.server_id == server.id for noted in state.failures):
            return
        address = (server.address[0], server.address[1])
        state.failures = [noted for noted in state.failures if noted.address != address][-KEPT_FAILURES:]
        state.failures.append(ServerFailure(server.id, address, cause))

    @contained
    def refused_head(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        """A request head above the caps: refused before there was a flow."""
        self.counters["refused_heads"] += 1
        self._end(conn, message, target)

    @contained
    def bad_request(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        """What a client sent is no request that could become a flow."""
        if not self._registry.client(conn).ending:
            self.counters["bad_requests"] += 1
            self._end(conn, message, target)

    @contained
    def unfinished_head(self, conn: connection.Client, target: tuple[str, int] | None, *, left: bool) -> None:
        """A client's connection ended within the head of a request. Open flows tell of that end themselves, and where
        we cut it there is nothing to tell but a deadline."""
        state = self._registry.client(conn)
        if state.ending or not (state.timed_out or (left and not state.flows)):
            return
        state.ending = True
        cause = Cause(ErrorType.CONNECTION_RESET, "the client closed the connection within the head of its request")
        if state.timed_out:
            cause = Cause(ErrorType.TIMEOUT, state.timed_out)
        self._raise_bounded(state, cause, self._url((target[0], target[1])) if target else "")

    @contained
    def crashed(self, conn: connection.Client, error: BaseException) -> None:
        """A layer of mitmproxy raised: what is open on the connection ends with it."""
        state = self._registry.client(conn)
        if state.ending:
            return
        state.ending = True
        self.counters["crashes"] += 1
        cause = replace(cause_of_exception(error), error_type=ErrorType.OTHER)
        if not state.flows:
            self._raise_bounded(state, cause, "")
        for flow in state.flows.values():
            flow.cut = flow.cut or cause

    @contained
    def broken_request(self, conn: connection.Client, message: str) -> None:
        """What ended the client's open flow, however its end is told."""
        for state in self._registry.client(conn).flows.values():
            state.cut = state.cut or cause_of_message(message)

    def _end(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        state = self._registry.client(conn)
        state.ending = True
        url = self._url((target[0], target[1])) if target else ""
        self._raise_bounded(state, Cause(ErrorType.PROTOCOL_ERROR, message), url)

    def _intended_url(self, state: ClientState) -> str:
        host, port = state.tls_target or (state.conn.sni or "", 443)
        return url_from("https", state.conn.sni or host, port, b"/") if host else ""

    def _url(self, address: tuple[str, int]) -> str:
        return url_from("http" if address[1] == 80 else "https", address[0], address[1], b"/")

    def _raise_bounded(self, client: ClientState, cause: Cause, url: str) -> None:
        """An error that anybody who can connect may cause at will."""
        left_out = self._flood.admit(client.conn.peername[0], time.monotonic())
        if left_out < 0:
            self.counters["errors_left_out"] += 1
            return
        if left_out:
            cause = replace(cause, message=f"{cause.message} ({left_out} more from this address were left out)")
        self._raise(client, cause, url)

    def _raise(self, client: ClientState, cause: Cause, url: str) -> None:
        if not self._recorder.keep.recorded:
            return
        self._emitter.write(
            ErrorRaised(
                **self._emitter.terminal(self._clock.time_us()),
                error_id=ids.new_id(),
                failure=failure(cause.message, cause),
                url=url,
                client=client.peer,
            )
        )
        self.counters["errors"] += 1


def _us_since(began: float) -> int:
    return max(0, round((time.monotonic() - began) * 1_000_000))
