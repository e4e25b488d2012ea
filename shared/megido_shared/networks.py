"""Lists of addresses and networks, as configurations hold them: comma-separated, IPv4 and IPv6."""

import ipaddress

type Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def entries(text: str) -> list[str]:
    """The entries of a comma-separated list, without spaces around them; empty ones do not count."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def parse_networks(text: str) -> tuple[Network, ...]:
    """Of `10.0.0.0/8, 192.168.1.7, fe80::/10`. An address is a network of one; bits of a host are refused, and
    IPv4-mapped IPv6 becomes the IPv4 that it is. Raises ValueError naming the entry."""
    return tuple(_network(entry) for entry in entries(text))


def _network(entry: str) -> Network:
    try:
        found = ipaddress.ip_network(entry)
    except ValueError as error:
        raise ValueError(f"{entry!r} is no address or network (CIDR): {error}") from None
    mapped = getattr(found.network_address, "ipv4_mapped", None)
    if mapped is None or found.prefixlen < 96:
        return found
    return ipaddress.IPv4Network((mapped, found.prefixlen - 96))
