"""The addon that decides by credentials who may use the proxy. It denies on every doubt, its own failure included.

Hooks are plain functions; only when a hash has to be computed do they return something to wait for.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from http import HTTPStatus

from mitmproxy import connection, http
from mitmproxy.proxy import mode_specs

from megido_capture.access.addresses import client_key, is_loopback
from megido_capture.access.attempts import Attempts
from megido_capture.access.credentials import Accepted, Given, parse
from megido_capture.access.farewell import TransportOf, answer, cut
from megido_capture.access.gate import SELF_AUTHENTICATED
from megido_capture.access.verifier import Outcome, Verifier
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters
from megido_capture.recording.flows import content_length
from megido_capture.recording.state import ClientState, Registry
from megido_shared.errors import ConfigurationError

logger = logging.getLogger(__name__)

HEADER = b"proxy-authorization"
CHALLENGES = ('Basic realm="megido", charset="UTF-8"', 'Bearer realm="megido"')
RETRY_AFTER = 2
"""Seconds that a throttled client is told to wait: what an address gets back in that time is one guess."""

BUFFER_AT_MOST = 64 * 1024
"""mitmproxy reads a refused request's whole body before it answers; above this the connection is closed instead."""

MAX_REFUSED = 10
"""Refusals after which a connection is closed. (Over HTTP/2, which clients speak only inside of a tunnel, none is.)"""

LEFT = 5.0
"""Seconds after which nothing comes any more of a client that has left."""

type CloseWith = Callable[[connection.Client, bytes], None]
"""Writes bytes to a client, past mitmproxy's layers."""


class Access:
    name = "megido-access"

    def __init__(
        self,
        attempts: Attempts,
        registry: Registry,
        counters: Counters,
        settings: CaptureSettings,
        *,
        close_with: CloseWith,
        transport: TransportOf,
    ) -> None:
        self._attempts = attempts
        self._registry = registry
        self._counters = counters
        self._close_with = close_with
        self._transport = transport
        self._settings = settings
        self._accepted = Accepted(settings)
        self._verifier = Verifier(self._accepted)
        self._tunnels: set[str] = set()
        """Clients whose credentials came with a CONNECT: what their requests inside it carry is for nobody."""
        self._refused: dict[str, list[str]] = {}
        """By client, its flows that were refused. Few: it is closed then."""

    @property
    def settings(self) -> CaptureSettings:
        return self._settings

    @settings.setter
    def settings(self, settings: CaptureSettings) -> None:
        """From now on only what `settings` accept counts, also for the connections that are open: those that were
        let in by something else are closed, tunnels and WebSockets included."""
        asked_before = self._settings.auth_required
        accepted, self._settings = Accepted(settings), settings
        if accepted.identities != self._accepted.identities:
            self._accepted = accepted
            self._verifier.use(accepted)
        for state in list(self._registry.clients.values()) if settings.auth_required else ():
            was_let_in = bool(state.authenticated) or not asked_before
            if was_let_in and state.authenticated not in accepted.identities and not _needs_none(state.conn):
                self._revoke(state)

    def http_connect(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        waiting = self._check(flow)
        if waiting is not None:
            return self._after(waiting, flow)
        self._forget_cut(flow)
        return None

    def requestheaders(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        return self._check(flow)

    def request(self, flow: http.HTTPFlow) -> None:
        if flow.request.trailers:
            _take(flow.request.trailers)

    def http_connected(self, flow: http.HTTPFlow) -> None:
        if self._settings.auth_required:
            self._tunnels.add(flow.client_conn.id)

    def client_disconnected(self, client: connection.Client) -> None:
        self._tunnels.discard(client.id)
        if refused := self._refused.pop(client.id, None):
            # A CONNECT whose client left meanwhile may get no further hook, or one that is under way still.
            asyncio.get_running_loop().call_later(LEFT, self._registry.refused.difference_update, refused)

    def done(self) -> None:
        self._verifier.close()
        self._attempts.close()

    def _check(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        try:
            # Taken off in every case: what is not checked here must not reach the upstream either.
            header = _take(flow.request.headers)
            if not self._settings.auth_required or flow.is_replay or _needs_none(flow.client_conn):
                return None
            client = self._registry.client(flow.client_conn)
            if client.authenticated and (header is None or flow.client_conn.id in self._tunnels):
                return None
            given = parse(header)
            if client.authenticated and self._verifier.is_still(given, client.authenticated):
                return None
            address = client_key(flow.client_conn.peername[0])
            outcome = self._verifier.at_once(given, address)
            if outcome is None:
                return self._verify(flow, client, given, address)
            self._conclude(flow, client, given, outcome)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._failed(flow, error)
        return None

    async def _verify(self, flow: http.HTTPFlow, client: ClientState, given: Given, address: str) -> None:
        try:
            with self._held(flow.client_conn):
                outcome = await self._verifier.verify(given, address)
            self._conclude(flow, client, given, outcome)
        except asyncio.CancelledError:
            self._refuse(flow)
            raise
        except Exception as error:  # noqa: BLE001 - fail closed
            self._failed(flow, error)

    async def _after(self, waiting: Awaitable[None], flow: http.HTTPFlow) -> None:
        await waiting
        self._forget_cut(flow)

    def _conclude(self, flow: http.HTTPFlow, client: ClientState, given: Given, outcome: Outcome) -> None:
        # Told before the client learns of it; a success once a connection.
        if not (outcome.identity and client.authenticated):
            hidden = True in [self._verifier.is_secret(text) for text in given.hidden]
            self._tell(client, "" if hidden else given.shown, outcome.reason)
        if outcome.identity:
            client.authenticated = outcome.identity
        else:
            self._refuse(flow, throttled=outcome.throttled)

    def _tell(self, client: ClientState, username: str, reason: str) -> None:
        if reason:
            self._attempts.refused(client.peer, username, reason)
        else:
            self._attempts.accepted(client.peer, username)
        self._counters["auth_refused" if reason else "auth_accepted"] += 1

    def _failed(self, flow: http.HTTPFlow, error: Exception) -> None:
        self._counters.hook_failed("access", error)
        self._refuse(flow)

    def _refuse(self, flow: http.HTTPFlow, *, throttled: bool = False) -> None:
        refused = self._remember_refused(flow)
        flow.request.stream = False  # mitmproxy cannot stream the body of an answered request: it would hang
        length = content_length(flow.request.headers)
        unbounded = length is None and "transfer-encoding" in flow.request.headers
        if unbounded or (length is not None and length > BUFFER_AT_MOST):
            flow.kill()
            self._close_with(flow.client_conn, answer(*_refusal(throttled=throttled)))
            return
        status, text, *fields = _refusal(throttled=throttled)
        flow.response = http.Response.make(status, f"{text}\n", {"Content-Type": "text/plain"})
        if refused >= MAX_REFUSED:
            fields.append("Connection: close")
        for field in fields:
            name, _, value = field.partition(": ")
            flow.response.headers.add(name, value)

    def _remember_refused(self, flow: http.HTTPFlow) -> int:
        """How many of the client's requests have been refused."""
        self._registry.refused.add(flow.id)
        if flow.client_conn.id not in self._registry.clients:
            return 0  # it has left: nothing comes that would forget it
        refused = self._refused.setdefault(flow.client_conn.id, [])
        refused.append(flow.id)
        return len(refused)

    def _forget_cut(self, flow: http.HTTPFlow) -> None:
        if flow.error is not None or flow.client_conn.id not in self._registry.clients:
            self._registry.refused.discard(flow.id)  # cut, or left: no hook comes that would forget it

    def _revoke(self, state: ClientState) -> None:
        state.authenticated = b""
        self._tell(state, "", "its credentials are accepted no more")
        self._counters["revoked_clients"] += 1
        cut(self._transport, state.conn, "credentials revoked")

    @contextmanager
    def _held(self, client: connection.Client) -> Generator[None]:
        """Reads nothing from a client while its credentials are hashed: mitmproxy would keep what it sends."""
        io = self._transport(client)
        transport = getattr(io.writer, "transport", None) if io is not None else None
        if transport is None:
            yield
            return
        with suppress(RuntimeError):  # it is closing
            transport.pause_reading()
        try:
            yield
        finally:
            with suppress(RuntimeError):
                transport.resume_reading()


def check_listeners(settings: CaptureSettings, modes: list[str], listen_host: str) -> None:
    """Raises ConfigurationError when somebody else could use the proxy without credentials.

    `listen_host` "" means that nobody named one; the caller then binds to loopback.
    """
    for text in modes:
        mode = mode_specs.ProxyMode.parse(text)
        if isinstance(mode, SELF_AUTHENTICATED):
            continue
        if settings.auth_required and not isinstance(mode, mode_specs.RegularMode | mode_specs.UpstreamMode):
            raise ConfigurationError(
                f"auth_required cannot be kept in mode {mode.type_name}: its clients have no way to send credentials"
            )
        host = mode.listen_host(listen_host)
        if host and not is_loopback(host) and not settings.auth_required:
            if not settings.allow_open_proxy:
                raise ConfigurationError(
                    f"refusing to listen on {host} without authentication; "
                    "set auth_required and auth_token, or allow_open_proxy if you mean it"
                )
            _warn_open(host)


@functools.lru_cache(64)
def _warn_open(host: str) -> None:
    """Once: the same is checked again with every configuration."""
    logger.warning("listening on %s without authentication: anybody who reaches it may use this proxy", host)


def _take(headers: http.Headers) -> str | None:
    """The credentials, which are then gone from the head."""
    for name, _ in headers.fields:
        if len(name) == len(HEADER) and name.lower() == HEADER:
            given: str = headers.pop(HEADER.decode())
            return given
    return None


def _needs_none(client: connection.Client) -> bool:
    return isinstance(client.proxy_mode, SELF_AUTHENTICATED)


def _refusal(*, throttled: bool) -> tuple[HTTPStatus, str, *tuple[str, ...]]:
    """Status, text and fields. 429 says that the credentials were not looked at, so no browser drops them."""
    if throttled:
        text = "Too many failed attempts to authenticate; try again in a moment"
        return HTTPStatus.TOO_MANY_REQUESTS, text, f"Retry-After: {RETRY_AFTER}"
    fields = [f"Proxy-Authenticate: {challenge}" for challenge in CHALLENGES]
    return HTTPStatus.PROXY_AUTHENTICATION_REQUIRED, "Proxy authentication required", *fields
