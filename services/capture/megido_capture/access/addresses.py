"""What the name of a peer says: its address, and what limits count it by."""

import functools
import ipaddress

type Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def address_of(host: str) -> Address | None:
    """The address that a peer's name stands for: without its zone, IPv4 out of IPv4-mapped IPv6."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def client_key(host: str) -> str:
    """What limits are counted by: the address, or the /64 of an IPv6 one, of which a single client has any number."""
    address = address_of(host)
    if isinstance(address, ipaddress.IPv6Address):
        return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"
    return host if address is None else str(address)


@functools.lru_cache(1024)
def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    address = address_of(host)
    return address is not None and address.is_loopback
