"""`blocked_destinations`: where nobody gets through the proxy."""

import re

from megido_shared.addresses import Address, innermost, literal
from megido_shared.networks import Network, entries, parse_networks

_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


class Blocked:
    """Of `host.example, *.suffix.example, 10.0.0.7, 169.254.0.0/16`. `*.suffix` is every name below the suffix.
    Raises ValueError naming an entry that is none of these."""

    def __init__(self, text: str) -> None:
        self._names: set[str] = set()
        suffixes: list[str] = []
        networks: list[Network] = []
        for entry in entries(text):
            name = plain(entry)
            address = literal(name)
            if address is not None or "/" in entry or ":" in entry:
                networks += parse_networks(entry if address is None else str(address))
            elif not _NAME.fullmatch(name):
                raise ValueError(f"{entry!r} is no host, *.suffix, address or network")
            elif name.startswith("*."):
                suffixes.append(name[1:])
            else:
                self._names.add(name)
        self._suffixes = tuple(suffixes)
        self.networks = tuple(networks)
        self.empty = not (self._names or suffixes or networks)

    def name(self, host: str) -> str:
        """The entry that blocks a name in its plain form, or empty."""
        if host in self._names:
            return host
        return next((f"*{suffix}" for suffix in self._suffixes if host.endswith(suffix)), "")

    def address(self, address: Address) -> str:
        """The entry that blocks an address or the IPv4 address inside it, or empty."""
        inner = innermost(address)
        return next((str(network) for network in self.networks if address in network or inner in network), "")


def plain(host: str) -> str:
    """A name as it is compared: lower case, without the root's dot, internationalised names in their ASCII form."""
    host = host.lower().rstrip(".")
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return host
