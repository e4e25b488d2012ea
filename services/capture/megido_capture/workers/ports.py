"""The ports of a group of workers: taken once by their parent, shared by them and by nobody else."""

import asyncio
import errno
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass

from mitmproxy.proxy import mode_servers, mode_specs

from megido_shared.errors import ConfigurationError

ATTEMPTS = 20
"""A port that is free at one address of a name may be taken at another."""

_SHAREABLE = (
    mode_specs.RegularMode,
    mode_specs.UpstreamMode,
    mode_specs.ReverseMode,
    mode_specs.Socks5Mode,
    mode_specs.TransparentMode,
)


@dataclass(frozen=True, slots=True)
class Reserved:
    """`modes` and `listen_port` with the ports that were picked where 0 was asked for. The sockets are bound and do
    not listen: while they are open nobody but processes of this user that ask to share can take these ports."""

    modes: list[str]
    listen_port: int
    sockets: tuple[socket.socket, ...]

    def close(self) -> None:
        for held in self.sockets:
            held.close()

    def __str__(self) -> str:
        return ",".join(f"{host}:{port}" for host, port, *_ in (held.getsockname() for held in self.sockets))


def reserve(modes: list[str], listen_host: str, listen_port: int) -> Reserved:
    """Takes every port that `modes` listen on. Raises ConfigurationError when one is taken, also by somebody who
    would share it, or when a mode has none that could be shared."""
    taken: dict[tuple[str, int], int] = {}
    named: list[str] = []
    with ExitStack() as on_error:
        sockets: list[socket.socket] = []
        for text in modes:
            mode = mode_specs.ProxyMode.parse(text)
            if not isinstance(mode, _SHAREABLE) or mode.transport_protocol == "udp" or _is_dns(mode):
                raise ConfigurationError(f"mode {text} cannot be served by several workers; leave --workers out")
            host = mode.listen_host(listen_host or "127.0.0.1")
            port = mode.listen_port(listen_port)
            assert port is not None
            if (host, port) not in taken:
                found = _take(host, port)
                for held in found:
                    on_error.callback(held.close)
                sockets += found
                taken[host, port] = found[0].getsockname()[1]
            named.append(_with_port(text, mode, taken[host, port]))
            if mode.custom_listen_port is None:
                listen_port = taken[host, port]
        on_error.pop_all()
    return Reserved(named, listen_port, tuple(sockets))


def share_ports() -> None:
    """From now on mitmproxy's TCP servers of this process share their port with the other workers'.

    mitmproxy makes them with `asyncio.start_server` and has no option for it. HTTP/3 of `reverse:https` is left out:
    its UDP socket cannot be shared.
    """
    setattr(mode_servers.AsyncioServerInstance, "listen", _listen)  # noqa: B010 - mypy refuses an assignment to a class


async def _listen(
    instance: "mode_servers.AsyncioServerInstance[mode_specs.ProxyMode]", host: str, port: int
) -> list[asyncio.Server]:
    return [await asyncio.start_server(instance.handle_stream, host, port, reuse_port=True)]


def _is_dns(mode: mode_specs.ProxyMode) -> bool:
    return isinstance(mode, mode_specs.ReverseMode) and mode.scheme == "dns"


def _with_port(text: str, mode: mode_specs.ProxyMode, port: int) -> str:
    if mode.custom_listen_port != 0:
        return text
    return text.rstrip("0") + str(port)


def _take(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that the name has."""
    for left in reversed(range(ATTEMPTS)):
        sockets: list[socket.socket] = []
        try:
            found = port
            for family, _, _, _, address in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                sockets.append(_bound(family, (address[0], found, *address[2:])))
                found = sockets[0].getsockname()[1]
            return sockets
        except OSError as error:
            for held in sockets:
                held.close()
            if port or not left or error.errno != errno.EADDRINUSE:
                reason = os.strerror(error.errno or 0) if not isinstance(error, socket.gaierror) else str(error)
                raise ConfigurationError(
                    f"the proxy cannot listen on {host}:{port} ({reason.lower()}); choose another with --listen-port"
                ) from None
    raise AssertionError


def _bound(family: int, address: tuple[object, ...]) -> socket.socket:
    """Bound as nobody shares, and only then opened for sharing. Asking for a port with SO_REUSEPORT at once would
    join a group that somebody else has there, in silence."""
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Passes over connections of an earlier life that linger, never over a socket that listens.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        held.bind(address)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        held.close()
        raise
    return held
