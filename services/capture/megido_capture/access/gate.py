"""The addon that decides by a client's address, before anything of it is counted or read. It denies on every doubt.

Only the address of the connection counts: `X-Forwarded-For` and its kin are what anybody may write.
"""

from collections.abc import Awaitable
from http import HTTPStatus

from mitmproxy import connection
from mitmproxy.proxy import mode_specs

from megido_capture.access.addresses import Address, address_of, is_loopback
from megido_capture.access.attempts import Attempts
from megido_capture.access.farewell import Farewell, cut
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters
from megido_capture.recording.flows import client_peer
from megido_capture.recording.state import Registry
from megido_shared.networks import Network, parse_networks

SELF_AUTHENTICATED = (mode_specs.WireGuardMode, mode_specs.LocalMode, mode_specs.TunMode)
"""Modes whose clients come through a key or from this machine's own kernel; they know of no proxy."""

_FAILED = "access control failed"


class AddressLists:
    """`ip_whitelist` and `ip_blacklist`. Raises ValueError on an entry that is none."""

    def __init__(self, allowed: str, denied: str) -> None:
        self._allowed = parse_networks(allowed)
        self._denied = parse_networks(denied)
        self.empty = not (self._allowed or self._denied)

    def refusal(self, host: str) -> str:
        """Why a client with that address is refused, or empty. What denies wins."""
        if self.empty:
            return ""
        address = address_of(host)
        if address is None:
            return f"{host[:64]!r} is no IP address"
        if found := _containing(self._denied, address):
            return f"{address} is denied by ip_blacklist ({found})"
        if self._allowed and not _containing(self._allowed, address):
            return f"{address} is not in ip_whitelist"
        return ""


class AddressGate:
    """Stands ahead of everything else."""

    name = "megido-addresses"

    def __init__(
        self,
        attempts: Attempts,
        registry: Registry,
        counters: Counters,
        settings: CaptureSettings,
        *,
        farewell: Farewell,
        loopback_only: bool = False,
    ) -> None:
        self.loopback_only = loopback_only
        """Nobody named an address to listen on: only this machine is served, whatever the listener does."""
        self._attempts = attempts
        self._registry = registry
        self._counters = counters
        self._farewell = farewell
        self._lists = AddressLists(settings.ip_whitelist, settings.ip_blacklist)

    def apply(self, settings: CaptureSettings) -> None:
        """Puts changed lists in force, also for the clients that are connected."""
        self._lists = AddressLists(settings.ip_whitelist, settings.ip_blacklist)
        for state in [] if self._lists.empty else list(self._registry.clients.values()):
            if why := self._refusal(state.conn):
                self._tell(state.conn, why)
                cut(self._farewell.transport, state.conn, "address denied")

    def client_connected(self, client: connection.Client) -> Awaitable[None] | None:
        try:
            why = self._refusal(client)
            if not why:
                return None
            client.error = why
            self._tell(client, why)
            return self._farewell.say(client, HTTPStatus.FORBIDDEN, "Megido does not serve this address.")
        except Exception as error:  # noqa: BLE001 - fail closed
            client.error = _FAILED
            self._counters.hook_failed("gate", error)
            return None

    def _refusal(self, client: connection.Client) -> str:
        if isinstance(client.proxy_mode, SELF_AUTHENTICATED):
            return ""
        if self.loopback_only and not is_loopback(client.peername[0]):
            return "only clients on this machine are served (no listen_host was given)"
        return self._lists.refusal(client.peername[0])

    def _tell(self, client: connection.Client, why: str) -> None:
        self._counters["refused_addresses"] += 1
        self._attempts.refused(client_peer(client), "", why)


def _containing(networks: tuple[Network, ...], address: Address) -> Network | None:
    return next((network for network in networks if address in network), None)
