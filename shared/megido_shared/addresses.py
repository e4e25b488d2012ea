"""Addresses as destinations: in which other addresses they hide, and whether they are this machine's."""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host (name or address) and port that belongs to Megido itself."""

    host: str
    port: int


def parse_endpoints(text: str) -> list[Endpoint]:
    """`host:port` and `[address]:port`, separated by commas. Raises ValueError."""
    return [_endpoint(part.strip()) for part in text.split(",") if part.strip()]


def _endpoint(text: str) -> Endpoint:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Endpoint(host.strip("[]") or "localhost", int(port))


def database_endpoints(url: str) -> list[Endpoint]:
    """The servers of a libpq or SQLAlchemy URL. A Unix socket is none."""
    parts = urlsplit(url)
    asked = parse_qs(parts.query)
    servers = [server for server in parts.netloc.rpartition("@")[2].split(",") if server]
    servers += [host for host in ",".join(asked.get("host", [])).split(",") if host and not host.startswith("/")]
    found = []
    for server in servers:
        host, colon, port = server.rpartition(":")
        if not colon or not port.isdigit():
            host, port = server, "".join(asked.get("port", [])[:1])
        found.append(Endpoint(host.strip("[]"), int(port) if port.isdigit() else 5432))
    return found


def literal(host: str) -> Address | None:
    """The address that a host spells, if it spells one: also `127.1`, `0x7f000001`, `017700000001` and `2130706433`,
    which connecting takes for addresses too (inet_aton), and IPv6 with brackets or a zone."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        pass
    if not host[:1].isdigit() or not host.isascii():
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def innermost(address: Address) -> Address:
    """The IPv4 address inside an IPv4-mapped, -compatible, 6to4 or NAT64 address; others as they are."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_here(address: Address) -> bool:
    """Whether it is an address of this machine: only those can be bound to."""
    inner = innermost(address)
    if inner.is_loopback or inner.is_unspecified:
        return True
    family = socket.AF_INET if inner.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(inner), 0))
        except OSError:
            return False
    return True
