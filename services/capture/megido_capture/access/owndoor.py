"""The addon that keeps clients from reaching Megido's own doors through the proxy (the class of CVE-2025-23217), and
what `blocked_destinations` names.

A name is judged before it is connected to, for a clear answer, and once more by the address that the connection has
really got: a name server that answers differently the second time changes nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from socket import SOCK_STREAM
from urllib.parse import urlsplit

from mitmproxy import connection, http
from mitmproxy.proxy import mode_specs, server_hooks

from megido_capture.access.openroutes import OpenRoutes
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters
from megido_shared.addresses import Address, Endpoint, database_endpoints, innermost, is_here, literal, parse_endpoints
from megido_shared.errors import ConfigurationError
from megido_shared.hostpatterns import HostPatterns, plain
from megido_shared.settings import METRICS_PORTS, Common

RESOLVE_SECONDS = 5.0
REMEMBER_SECONDS = 30.0
"""How long the addresses of our own doors are good for."""

_LOOPBACK = literal("127.0.0.1")
_UNCHECKED = "the destination could not be checked"

type Refuse = Callable[[connection.Client, connection.Server, str], None]
"""Ends a connection that was just made, before a byte is sent, and notes why."""


class OwnDoor:
    name = "megido-own-door"

    def __init__(
        self,
        own: Iterable[tuple[Endpoint, str]],
        settings: CaptureSettings,
        counters: Counters,
        *,
        listening: Callable[[], Iterable[Endpoint]],
        refuse: Refuse,
        routes: OpenRoutes,
    ) -> None:
        self._own = [(Endpoint(plain(door.host), door.port), what) for door, what in own]
        self._listening = listening
        self._refuse = refuse
        self._routes = routes
        self._counters = counters
        self._addresses: dict[str, tuple[float, frozenset[Address]]] = {}
        self._blocked = HostPatterns(settings.blocked_destinations)

    def apply(self, settings: CaptureSettings) -> None:
        """For the connections that are made from now on, and for those that are open."""
        blocked = HostPatterns(settings.blocked_destinations)
        self._blocked = blocked
        if not blocked.empty:
            self._routes.end(self._why_not, self._why_not_named)

    def protect(self, door: Endpoint, what: str) -> None:
        self._own.append((door, what))

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> Awaitable[None] | None:
        """By name, and by address as far as that is known; only what may be meant is resolved."""
        if data.server.address is None:
            return None
        try:
            host, port = plain(data.server.address[0]), data.server.address[1]
            doors, blocked = self._doors(port), self._blocked_for(data.client, data.server)
            if not doors and blocked is None:
                return None
            if why := self._by_name(host, port, doors, blocked):
                self._stop(data, why)
                return None
            return self._by_resolving(data, host, port, doors, blocked)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._failed(data, error)
            return None

    def server_connected(self, data: server_hooks.ServerConnectionHookData) -> None:
        """By the address at the other end, and by name again: what is blocked may have changed since it was asked
        for, and `apply` ends only what is open."""
        if data.server.address is None or not data.server.peername:
            return
        try:
            host, port = plain(data.server.address[0]), data.server.address[1]
            doors, blocked = self._doors(port), self._blocked_for(data.client, data.server)
            why = ""
            if doors or blocked is not None:
                why = self._by_name(host, port, doors, blocked) or self._by_peer(data.server, doors, blocked)
            if why:
                self._counters["refused_destinations"] += 1
                self._refuse(data.client, data.server, why)
            else:
                self._routes.opened(data.client, data.server)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._counters.hook_failed("own_door", error)
            self._refuse(data.client, data.server, _UNCHECKED)

    def server_disconnected(self, data: server_hooks.ServerConnectionHookData) -> None:
        self._routes.server_gone(data.client, data.server)

    def client_disconnected(self, client: connection.Client) -> None:
        self._routes.client_gone(client)

    def http_connect(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        return self._check_chained(flow)

    def requestheaders(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        return self._check_chained(flow)

    def _check_chained(self, flow: http.HTTPFlow) -> Awaitable[None] | None:
        """With a proxy behind this one, that one connects: all there is to judge is what it would be told. Where that
        is an address, it may be that of a door which is known by name."""
        if type(flow.client_conn.proxy_mode) is not mode_specs.UpstreamMode or flow.response is not None:
            return None
        try:
            host, port = plain(flow.request.data.host), flow.request.data.port
            doors = self._doors(port)
            if doors and _spelled(host) is not None:
                return self._after_learning(flow, host, port, doors)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._answer_unchecked(flow, error)
        else:
            self._judge_chained(flow, host, port, doors)
        return None

    async def _after_learning(
        self, flow: http.HTTPFlow, host: str, port: int, doors: list[tuple[Endpoint, str]]
    ) -> None:
        try:
            for door, _ in doors:
                await self._learn(door.host)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._answer_unchecked(flow, error)
        else:
            self._judge_chained(flow, host, port, doors)

    def _judge_chained(self, flow: http.HTTPFlow, host: str, port: int, doors: list[tuple[Endpoint, str]]) -> None:
        try:
            why = self._by_what_is_told(host, port, doors)
            if not why and flow.client_conn.timestamp_end is None:  # else it is gone, and nobody would forget it
                self._routes.chained(flow.client_conn, (host, port))
        except Exception as error:  # noqa: BLE001 - fail closed
            self._answer_unchecked(flow, error)
        else:
            if why:
                self._answer(flow, why)

    def _answer_unchecked(self, flow: http.HTTPFlow, error: Exception) -> None:
        self._counters.hook_failed("own_door", error)
        self._answer(flow, _UNCHECKED)

    def _answer(self, flow: http.HTTPFlow, why: str) -> None:
        self._counters["refused_destinations"] += 1
        flow.response = http.Response.make(HTTPStatus.FORBIDDEN, f"{why}\n", {"Content-Type": "text/plain"})

    def _why_not(self, client: connection.Client, server: connection.Server) -> str:
        """Of a connection that is open."""
        blocked = self._blocked_for(client, server)
        if server.address is None or blocked is None:
            return ""
        try:
            found = self._by_name(plain(server.address[0]), server.address[1], [], blocked)
            return found or self._by_peer(server, [], blocked)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._counters.hook_failed("own_door", error)
            return _UNCHECKED

    def _why_not_named(self, _: connection.Client, place: tuple[str, int]) -> str:
        try:
            return self._by_what_is_told(*place, [])
        except Exception as error:  # noqa: BLE001 - fail closed
            self._counters.hook_failed("own_door", error)
            return _UNCHECKED

    def _by_what_is_told(self, host: str, port: int, doors: list[tuple[Endpoint, str]]) -> str:
        why = self._by_name(host, port, doors, self._blocked)
        if not why and (address := _spelled(host)) is not None:
            why = self._judge(f"{host}:{port}", port, address, doors, self._blocked)
        return why

    def _by_peer(
        self, server: connection.Server, doors: list[tuple[Endpoint, str]], blocked: HostPatterns | None
    ) -> str:
        assert server.address is not None
        address = literal(server.peername[0]) if server.peername else None
        if address is None:
            return _UNCHECKED
        return self._judge(_shown(server), server.address[1], address, doors, blocked)

    def _doors(self, port: int) -> list[tuple[Endpoint, str]]:
        own = [(door, what) for door, what in self._own if door.port == port]
        return own + [(door, "own listener") for door in self._listening() if door.port == port]

    def _blocked_for(self, client: connection.Client, server: connection.Server) -> HostPatterns | None:
        """What is blocked for clients; the proxy behind this one is the operator's own choice."""
        mode = client.proxy_mode
        is_chained = isinstance(mode, mode_specs.UpstreamMode) and server.address == mode.address
        return None if self._blocked.empty or is_chained else self._blocked

    def _by_name(self, host: str, port: int, doors: list[tuple[Endpoint, str]], blocked: HostPatterns | None) -> str:
        for door, what in doors:
            if door.host == host:
                return _own(f"{host}:{port}", what)
        entry = blocked.name(host, port) if blocked is not None else ""
        return _is_blocked(host, entry) if entry else ""

    async def _by_resolving(
        self,
        data: server_hooks.ServerConnectionHookData,
        host: str,
        port: int,
        doors: list[tuple[Endpoint, str]],
        blocked: HostPatterns | None,
    ) -> None:
        try:
            for door, _ in doors:
                await self._learn(door.host)
            spelled = _spelled(host)
            if spelled is not None:
                addresses = frozenset((spelled,))
            elif doors or (blocked is not None and blocked.has_networks):
                addresses = await _resolve(host)
            else:
                return
            for address in addresses:
                if why := self._judge(_shown(data.server), port, address, doors, blocked):
                    self._stop(data, why)
                    return
        except Exception as error:  # noqa: BLE001 - fail closed
            self._failed(data, error)

    def _judge(
        self,
        shown: str,
        port: int,
        address: Address,
        doors: list[tuple[Endpoint, str]],
        blocked: HostPatterns | None,
    ) -> str:
        for door, what in doors:
            _, own = self._addresses.get(door.host, (0.0, frozenset[Address]()))
            own = own or frozenset(filter(None, (_spelled(door.host),)))
            if innermost(address) in own or (any(map(is_here, own)) and is_here(address)):
                return _own(shown, what)
        entry = blocked.address(address, port) if blocked is not None else ""
        return _is_blocked(shown if str(address) in shown else f"{shown} ({address})", entry) if entry else ""

    async def _learn(self, host: str) -> None:
        """The addresses of one of our doors."""
        expires, _ = self._addresses.get(host, (0.0, None))
        if time.monotonic() > expires:
            spelled = _spelled(host)
            found = await _resolve(host) if spelled is None else frozenset((spelled,))
            self._addresses[host] = time.monotonic() + REMEMBER_SECONDS, frozenset(map(innermost, found))

    def _stop(self, data: server_hooks.ServerConnectionHookData, why: str) -> None:
        self._counters["refused_destinations"] += 1
        data.server.error = why

    def _failed(self, data: server_hooks.ServerConnectionHookData, error: Exception) -> None:
        self._counters.hook_failed("own_door", error)
        data.server.error = _UNCHECKED


def doors_of(api_url: str, common: Common, protect: str = "") -> list[tuple[Endpoint, str]]:
    """Our own endpoints, as far as a node knows them, and where services have their metrics unless they are told
    otherwise. Raises ConfigurationError on a `protect` that names none."""
    url = urlsplit(api_url)
    doors = [(Endpoint(url.hostname or "", url.port or (443 if url.scheme == "https" else 80)), "own API (api_url)")]
    for server in common.kafka.split(",") if common.kafka else ():
        host, _, port = server.strip().rpartition(":")
        if port.isdigit():
            doors.append((Endpoint(host.strip("[]"), int(port)), "own Kafka"))
    doors += [(door, "own database") for door in database_endpoints(common.database_url)]
    doors += [(Endpoint("localhost", port), f"own {service}'s metrics") for service, port in METRICS_PORTS.items()]
    try:
        return doors + [(door, "own port") for door in parse_endpoints(protect)]
    except ValueError as error:
        raise ConfigurationError(f"megido_protect: {error}") from None


def _spelled(host: str) -> Address | None:
    """The address that a name is, without asking anybody."""
    return _LOOPBACK if host == "localhost" or host.endswith(".localhost") else literal(host)


async def _resolve(host: str) -> frozenset[Address]:
    """None when it has none: the connection fails in the same way."""
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return frozenset()
    return frozenset(address for *_, peer in found if (address := literal(str(peer[0]))) is not None)


def _shown(server: connection.Server) -> str:
    host, port = server.address or ("", 0)
    return f"{host}:{port}"


def _own(shown: str, what: str) -> str:
    return f"{shown} is Megido's {what} and not reachable through the proxy"


def _is_blocked(shown: str, entry: str) -> str:
    return f"{shown} is not reachable through the proxy (blocked_destinations: {entry})"
