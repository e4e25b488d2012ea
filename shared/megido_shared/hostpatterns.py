"""Lists of hosts, as configurations hold them: names, wildcards, addresses, networks, each with a port or without."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megido_shared.addresses import Address, innermost, literal
from megido_shared.networks import Network, entries, parse_networks

_LABEL = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NETWORK = re.compile(r".*[:/].*|[0-9.]+")


@dataclass(frozen=True, slots=True)
class HostPattern:
    """One of `name` (as `plain` gives it), `suffix` (a dot and a name: every name below it, not the name itself) and
    `network`. `port` 0 is any; `text` is the entry as it was written."""

    text: str
    name: str = ""
    suffix: str = ""
    network: Network | None = None
    port: int = 0


class HostPatterns:
    """Of `bank.example, *.apple.com, 10.0.0.7, 10.0.0.0/8:8443, [2001:db8::1]:443`."""

    def __init__(self, text: str) -> None:
        """Raises ValueError naming the entry and what is wrong with it."""
        patterns = [_pattern(entry) for entry in entries(text)]
        self._named: dict[str, list[HostPattern]] = {}
        for pattern in patterns:
            if pattern.name:
                self._named.setdefault(pattern.name, []).append(pattern)
        self._below = [pattern for pattern in patterns if pattern.suffix]
        self._networks = [(pattern.network, pattern) for pattern in patterns if pattern.network is not None]
        self.empty = not patterns
        self.has_networks = bool(self._networks)

    def name(self, host: str, port: int) -> str:
        """The entry that a name in its plain form is on, or empty."""
        found = (pattern for pattern in self._named.get(host, ()) if pattern.port in (0, port))
        below = (p for p in self._below if host.endswith(p.suffix) and p.port in (0, port))
        pattern = next(found, None) or next(below, None)
        return pattern.text if pattern else ""

    def address(self, address: Address, port: int) -> str:
        """The entry that an address, or the IPv4 address inside it, is on; or empty."""
        inner = innermost(address)
        found = (
            pattern.text
            for network, pattern in self._networks
            if pattern.port in (0, port) and (address in network or inner in network)
        )
        return next(found, "")

    def match(self, hosts: Iterable[str], port: int) -> bool:
        """Whether one of a server's names and addresses, in whatever form, is on the list."""
        return any(self._matches(plain(host), port) for host in hosts if host)

    def _matches(self, host: str, port: int) -> bool:
        address = literal(host)
        return bool(self.name(host, port) if address is None else self.address(address, port))


def plain(host: str) -> str:
    """A host as it is compared: lower case, without the root's dot, brackets and zone, internationalised names in
    their ASCII form."""
    host = host.strip().lower().rstrip(".").removeprefix("[").removesuffix("]")
    if ":" in host:
        return host.partition("%")[0]
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host


def _pattern(entry: str) -> HostPattern:
    host, port = _split_port(entry)
    address = literal(host)
    if address is not None or _NETWORK.fullmatch(host):
        (network,) = parse_networks(host if address is None else str(address))
        return HostPattern(entry, network=network, port=port)
    below = host.startswith("*.")
    name = plain(host[2:] if below else host)
    if not _NAME.fullmatch(name):
        raise ValueError(f"{entry!r} is no host name, *.name, address or network (CIDR), with or without :port")
    return HostPattern(entry, suffix=f".{name}", port=port) if below else HostPattern(entry, name=name, port=port)


def _split_port(entry: str) -> tuple[str, int]:
    host, colon, port = entry.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")) or (entry.startswith("[") and entry.endswith("]")):
        return entry, 0
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ValueError(f"{entry!r} has no port between 1 and 65535 behind its colon")
    return host, int(port)
