"""Lists of hosts, as configurations hold them: names, wildcards, addresses, networks, each with a port or without."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from megido_shared.destinations import plain
from megido_shared.networks import Network, entries, parse_networks

_LABEL = set("abcdefghijklmnopqrstuvwxyz0123456789-_")


@dataclass(frozen=True, slots=True)
class HostPattern:
    """`name` is lower case without a dot at its end, in A-labels; with `below`, every name below it is meant and not
    the name itself. `port` 0 is any."""

    name: str = ""
    below: bool = False
    network: Network | None = None
    port: int = 0

    def matches(self, host: str, port: int) -> bool:
        if self.port and self.port != port:
            return False
        if self.network is not None:
            address = _address(host)
            return address is not None and address.version == self.network.version and address in self.network
        return host.endswith("." + self.name) if self.below else host == self.name


@dataclass(frozen=True, slots=True)
class HostPatterns:
    """`bank.example, *.apple.com, 10.0.0.0/8:8443, [2001:db8::1]:443`."""

    patterns: tuple[HostPattern, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "HostPatterns":
        """Raises ValueError naming the entry and what is wrong with it."""
        return cls(tuple(_pattern(entry) for entry in entries(text)))

    def match(self, hosts: Iterable[str], port: int) -> bool:
        """Whether one of a server's names and addresses is on the list."""
        return any(pattern.matches(host, port) for host in map(plain_host, hosts) if host for pattern in self.patterns)


def plain_host(host: str) -> str:
    """A host as it is compared: lower case, no dot at the end, no brackets, no zone, A-labels."""
    host = host.strip().lower().rstrip(".").removeprefix("[").removesuffix("]")
    return host.partition("%")[0] if ":" in host else plain(host)


def _pattern(entry: str) -> HostPattern:
    host, port = _split_port(entry)
    if _looks_like_network(host):
        try:
            return HostPattern(network=parse_networks(host.removeprefix("[").removesuffix("]"))[0], port=port)
        except ValueError as error:
            raise ValueError(str(error)) from None
    below = host.startswith("*.")
    name = plain_host(host[2:] if below else host)
    if not name or not all(label and set(label) <= _LABEL for label in name.split(".")):
        raise ValueError(f"{entry!r} is no host name, *.name, address or network (CIDR), with or without :port")
    return HostPattern(name=name, below=below, port=port)


def _split_port(entry: str) -> tuple[str, int]:
    host, colon, port = entry.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or (entry.startswith("[") and entry.endswith("]")):
        return entry, 0
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError(f"{entry!r} has no port between 1 and 65535 behind its colon")
    return host, int(port)


def _looks_like_network(host: str) -> bool:
    return ":" in host or "/" in host or host.replace(".", "").isdigit()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
