"""The addon that decides who may use the proxy. It denies on every doubt, its own failure included."""

import functools
import hmac
import ipaddress
import logging
from base64 import b64decode
from collections.abc import Callable

from mitmproxy import connection, http
from mitmproxy.proxy import mode_specs

from megido_capture.counters import Counters
from megido_capture.emitter import Emitter
from megido_capture.flows import content_length
from megido_capture.settings import CaptureSettings
from megido_capture.state import ClientState, Registry
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.errors import ConfigurationError
from megido_shared.events import AuthAttempted

logger = logging.getLogger(__name__)

HEADER = "Proxy-Authorization"
CHALLENGES = ('Basic realm="megido"', 'Bearer realm="megido"')
BUFFER_AT_MOST = 64 * 1024
"""mitmproxy reads a refused request's whole body before it answers; above this the connection is closed instead."""

type CloseWith = Callable[[connection.Client, bytes], None]
"""Writes bytes to a client and closes it."""

_SELF_AUTHENTICATED = (mode_specs.WireGuardMode, mode_specs.LocalMode, mode_specs.TunMode)


class Access:
    name = "megido-access"

    def __init__(
        self,
        emitter: Emitter,
        registry: Registry,
        counters: Counters,
        clock: Clock,
        settings: CaptureSettings,
        *,
        close_with: CloseWith,
        loopback_only: bool = False,
    ) -> None:
        self.settings = settings
        self.loopback_only = loopback_only
        """Nobody named an address to listen on: only this machine is served, whatever the listener does."""
        self._emitter = emitter
        self._registry = registry
        self._counters = counters
        self._clock = clock
        self._close_with = close_with

    def client_connected(self, client: connection.Client) -> None:
        try:
            if self.loopback_only and not _is_local(client):
                client.error = "only clients on this machine are served (no listen_host was given)"
        except Exception as error:  # noqa: BLE001 - fail closed
            client.error = "access control failed"
            self._counters.hook_failed("access", error)

    def http_connect(self, flow: http.HTTPFlow) -> None:
        self._check(flow)
        if flow.error is not None:
            self._registry.refused.discard(flow.id)  # cut: no hook comes that would forget it

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        self._check(flow)

    def _check(self, flow: http.HTTPFlow) -> None:
        try:
            # Taken off in every case: what is not checked here must not reach the upstream either.
            given = flow.request.headers.pop(HEADER, None)
            if not self.settings.auth_required or flow.is_replay:
                return
            client = self._registry.client(flow.client_conn)
            if client.authenticated:
                return
            self._decide(flow, client, given)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._counters.hook_failed("access", error)
            self._refuse(flow)

    def _decide(self, flow: http.HTTPFlow, client: ClientState, given: str | None) -> None:
        username, reason = check(given, self.settings.auth_token)
        if not reason:
            client.authenticated = True
        else:
            self._refuse(flow)
        self._emitter.write(
            AuthAttempted(
                **self._emitter.terminal(self._clock.time_us()),
                auth_id=ids.new_id(),
                success=not reason,
                username=username,
                failure_reason=reason,
                client=client.peer,
            )
        )
        self._counters["auth_refused" if reason else "auth_accepted"] += 1

    def _refuse(self, flow: http.HTTPFlow) -> None:
        self._registry.refused.add(flow.id)
        flow.request.stream = False  # mitmproxy cannot stream the body of an answered request: it would hang
        length = content_length(flow.request.headers)
        unbounded = length is None and "transfer-encoding" in flow.request.headers
        if unbounded or (length is not None and length > BUFFER_AT_MOST):
            flow.kill()
            self._close_with(flow.client_conn, _refusal_bytes())
        else:
            flow.response = _refusal()


def check(given: str | None, token: str) -> tuple[str, str]:
    """The user name of Basic credentials, and why they are refused ("" when they are not).

    `Bearer <token>`, or Basic with any user name and the token as password.
    """
    if not given:
        return "", "no credentials"
    scheme, _, value = given.strip().partition(" ")
    match scheme.lower():
        case "bearer":
            return "", "" if _equal(value.strip(), token) else "wrong token"
        case "basic":
            try:
                decoded = b64decode(value.strip(), validate=True).decode("utf-8", "surrogateescape")
            except ValueError:
                return "", "malformed Basic credentials"
            username, colon, password = decoded.partition(":")
            shown = username.encode("utf-8", "replace").decode()[:200]
            return shown, "" if colon and _equal(password, token) else "wrong password"
        case _:
            return "", f"unsupported scheme {scheme[:20]!r}"


def check_listeners(settings: CaptureSettings, modes: list[str], listen_host: str) -> None:
    """Raises ConfigurationError when somebody else could use the proxy without credentials.

    `listen_host` "" means that nobody named one; the caller then binds to loopback.
    """
    for text in modes:
        mode = mode_specs.ProxyMode.parse(text)
        if isinstance(mode, _SELF_AUTHENTICATED):
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
            logger.warning("listening on %s without authentication: anybody who reaches it may use this proxy", host)


@functools.cache
def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_local(client: connection.Client) -> bool:
    return isinstance(client.proxy_mode, _SELF_AUTHENTICATED) or is_loopback(client.peername[0])


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode("utf-8", "surrogateescape"))


def _refusal() -> http.Response:
    response = http.Response.make(407, b"Proxy authentication required\n", {"Content-Type": "text/plain"})
    for challenge in CHALLENGES:
        response.headers.add("Proxy-Authenticate", challenge)
    return response


def _refusal_bytes() -> bytes:
    response = _refusal()
    response.headers["Connection"] = "close"
    head = b"HTTP/1.1 407 Proxy Authentication Required\r\n"
    return head + bytes(response.headers) + b"\r\n" + (response.raw_content or b"")
