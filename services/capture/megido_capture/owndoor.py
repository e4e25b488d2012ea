"""The addon that keeps clients from reaching Megido's own API, or its Kafka, through the proxy (the class of
CVE-2025-23217)."""

import asyncio
import socket
from urllib.parse import urlsplit

from mitmproxy.proxy import server_hooks

from megido_capture.gate import is_loopback

_ANY_ADDRESS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - as a destination they lead to this machine
_RESOLVE_SECONDS = 5.0


class OwnDoor:
    name = "megido-own-door"

    def __init__(self, api_url: str, kafka: str = "") -> None:
        url = urlsplit(api_url)
        doors = [(url.hostname or "", url.port or (443 if url.scheme == "https" else 80), "own API (api_url)")]
        for server in kafka.split(",") if kafka else ():
            host, _, port = server.strip().rpartition(":")
            if port.isdigit():
                doors.append((host, int(port), "own Kafka"))
        self._doors = [(_plain(host), port, what) for host, port, what in doors]

    async def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """By name and by address. A name is resolved only when its port is one of ours."""
        if data.server.address is None:
            return
        host, port = _plain(data.server.address[0]), data.server.address[1]
        for own, own_port, what in self._doors:
            if port == own_port and (host == own or (_leads_here(own) and await _ends_here(host, port))):
                data.server.error = f"{host}:{port} is Megido's {what} and not reachable through the proxy"
                return


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _leads_here(host: str) -> bool:
    return is_loopback(host) or host.endswith(".localhost") or host in _ANY_ADDRESS


async def _ends_here(host: str, port: int) -> bool:
    """Also for `127.1`, `2130706433` and a foreign name whose address is this machine's."""
    if _leads_here(host):
        return True
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return False  # the connection fails in the same way
    return any(_leads_here(str(address[0])) for *_, address in found)
