"""Where replays may go. A target is resolved once, every address is checked, and only those are connected to.

Refused always: link-local addresses (cloud metadata lives there), other metadata addresses, what is no unicast
address, and Megido's own ports, so that a recorded request cannot be turned against what recorded it. Loopback
and private addresses are for those who run Megido on their own machine.
"""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterable, Sequence

from megido_shared.addresses import Address, Endpoint, innermost, is_here, parse_endpoints
from megido_shared.errors import MegidoError
from megido_shared.events import ErrorType

__all__ = ["Endpoint", "Gate", "Refused", "Unresolved", "forbidden", "parse_endpoints", "resolve"]

_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, DigitalOcean, OpenStack
        "fd00:ec2::254",  # AWS
        "168.63.129.16",  # Azure's wire server
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
    )
)
_METADATA_NAMES = ("metadata.google.internal", "metadata.goog", "instance-data")


class Refused(MegidoError):
    """A target that replays must not reach. Nothing was sent."""


class Unresolved(MegidoError):
    """A name without an address; `error_type` as events have it."""

    error_type = ErrorType.DNS_ERROR


class Gate:
    """Decides about the targets of one job, and resolves each name once: later answers of a name server change
    nothing. `protected` are Megido's own endpoints; the same port on any address of this machine counts as the same
    when an endpoint's host is this machine."""

    def __init__(self, protected: Iterable[Endpoint] = ()) -> None:
        self._protected = frozenset(protected)
        self._resolved: dict[str, list[Address]] = {}

    async def admit(self, host: str, port: int, *, allow_loopback: bool) -> tuple[str, ...]:
        """The target's addresses, to be connected to as they are. Raises Refused, Unresolved."""
        name = host.rstrip(".").lower()
        self._check_name(name, port)
        addresses = await self._resolve(name)
        own = await self._own_addresses(port)
        for address in addresses:
            reason = forbidden(address, allow_loopback=allow_loopback)
            if reason is None and _reaches(address, own):
                reason = f"port {port} is one of Megido's own"
            if reason is not None:
                shown = host if str(address) == name else f"{host} ({address})"
                raise Refused(f"a replay to {shown} port {port} is refused: {reason}")
        return tuple(str(address) for address in addresses)

    def _check_name(self, name: str, port: int) -> None:
        if name in _METADATA_NAMES:
            raise Refused(f"a replay to {name} is refused: it serves cloud metadata")
        if any(endpoint.port == port and endpoint.host.lower() == name for endpoint in self._protected):
            raise Refused(f"a replay to {name} port {port} is refused: port {port} is one of Megido's own")

    async def _own_addresses(self, port: int) -> frozenset[Address]:
        """Of the protected endpoints with that port. One whose name does not resolve now cannot be reached."""
        found: set[Address] = set()
        for endpoint in self._protected:
            if endpoint.port == port:
                try:
                    found.update(map(innermost, await self._resolve(endpoint.host.lower())))
                except Unresolved:
                    continue
        return frozenset(found)

    async def _resolve(self, name: str) -> list[Address]:
        if name not in self._resolved:
            self._resolved[name] = await resolve(name)
        return self._resolved[name]


def forbidden(address: Address, *, allow_loopback: bool) -> str | None:
    """Why replays must not go to that address, or None. Embedded IPv4 addresses are judged too."""
    inner = innermost(address)
    if inner in _METADATA:
        return "it serves cloud metadata"
    if inner.is_link_local:
        return "link-local addresses are never replayed to"
    if inner.is_unspecified or inner.is_multicast or (inner.is_reserved and not inner.is_loopback):
        return "it is no address of a single host"
    if inner.version == 4 and int(inner) >> 24 == 0:
        return "it is no address of a single host"
    if not allow_loopback and not inner.is_global:
        kind = "loopback" if inner.is_loopback else "private"
        return f"{kind} addresses are allowed only where the API itself listens on loopback, or when asked for"
    return None


def _reaches(address: Address, own: frozenset[Address]) -> bool:
    """Whether a connection to `address` may end at one of `own`, through any address of this machine."""
    if not own:
        return False
    return innermost(address) in own or (is_here(address) and any(map(is_here, own)))


async def resolve(host: str) -> list[Address]:
    """The addresses of a name or a literal, as the system orders them. Raises Unresolved."""
    try:
        return [ipaddress.ip_address(host)]
    except ValueError:
        pass
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[Address]] = loop.create_future()
    # A daemon thread, not the loop's executor: a resolver that hangs must not hold up the end of the process.
    threading.Thread(target=_look_up, args=(host, loop, answer), name=f"dns {host}", daemon=True).start()
    return list(await answer)


def _look_up(host: str, loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[Sequence[Address]]") -> None:
    found: Sequence[Address] | Unresolved
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        found = list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        found = Unresolved(f"{host} cannot be resolved: {reason}")

    def tell() -> None:
        if answer.done():
            return
        if isinstance(found, Unresolved):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    if not loop.is_closed():
        loop.call_soon_threadsafe(tell)
