"""Addresses as destinations: in which other addresses they hide, and whether they are this machine's."""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from megido_shared.errors import ConfigurationError

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
    """The servers of a libpq or SQLAlchemy URL: those that `host` and `hostaddr` name as well as those before the path,
    whichever libpq would take. A Unix socket is none.

    As libpq has it, several hosts have as many ports, or one for all of them; an empty one is 5432. Raises
    ConfigurationError where that cannot be read, and on `service`, whose servers are in a file of libpq's. Source:
    PostgreSQL's documentation, 32.1.1.3 (multiple hosts) and 32.1.2 (`host`, `hostaddr`, `port`, `service`).
    """
    try:
        parts = urlsplit(url)
        asked = parse_qs(parts.query)
    except ValueError:
        raise ConfigurationError("the database URL cannot be read: its servers are unknown") from None
    if url and not parts.scheme:
        raise ConfigurationError("the database URL cannot be read: postgresql://HOST:PORT/NAME is needed")
    if "service" in asked:
        raise ConfigurationError("the database URL names a service: name its servers (host and port) instead")
    beside = [_host_and_port(item) for item in _items(unquote(parts.netloc.rpartition("@")[2]))]
    named = [_host_and_port(item) for item in _items(*asked.get("host", ()))]
    addresses = [(item, "") for item in _items(*asked.get("hostaddr", ()))]
    ports = _items(*asked.get("port", ()))
    found = _servers(beside, ports)
    ports = ports or [port for _, port in beside]
    found += _servers(named, ports)
    found += _servers(addresses, [port for _, port in named] if any(port for _, port in named) else ports)
    return list(dict.fromkeys(found))


def _items(*values: str) -> list[str]:
    """Empty ones too: they have their place among the others."""
    text = ",".join(values)
    return [item.strip() for item in text.split(",")] if text else []


def _servers(named: list[tuple[str, str]], ports: list[str]) -> list[Endpoint]:
    """Hosts, each with the port beside it or "", and the ports that are given apart; both where both are given."""
    if named and len(ports) not in (0, 1, len(named)):
        raise ConfigurationError(f"the database URL has {len(named)} hosts and {len(ports)} ports: which is whose?")
    apart = ports if len(ports) == len(named) else (ports or [""]) * len(named)
    return [
        Endpoint(host, _port(port))
        for (host, own), other in zip(named, apart, strict=True)
        if host and host[0] not in "/@"  # "@": an abstract Unix socket
        for port in dict.fromkeys(filter(None, (own, other))) or ("",)
    ]


def _host_and_port(text: str) -> tuple[str, str]:
    """An IPv6 address without brackets has no port."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]") or text.startswith(("/", "@")) or (":" in host and not host.endswith("]")):
        host, port = text, ""
    return host.removeprefix("[").removesuffix("]"), port


def _port(text: str) -> int:
    if not text:
        return 5432
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ConfigurationError("the database URL has a port that is no number from 1 to 65535")  # part of a password?
    return int(text)


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
