"""Connections by origin: opened to pinned addresses, kept for the next request, never more than asked for."""

import asyncio
import os
import socket
import ssl
import time
from collections import deque

from megido_replayer.transport.connection import Connection
from megido_replayer.transport.messages import Origin, SendError
from megido_replayer.transport.tls import TlsContexts
from megido_shared.events import ErrorType, Timing

MAX_IDLE_S = 15.0
MAX_IDLE = 512


class Pool:
    """Idle connections, the latest first: an old one is the likeliest to have been closed by the server."""

    def __init__(self, tls: TlsContexts, *, connect_timeout_s: float = 10.0) -> None:
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[Origin, deque[Connection]] = {}
        self._idle_count = 0

    def take(self, origin: Origin) -> Connection | None:
        """A connection to that origin that seems to be alive, or None."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if connection.alive and time.monotonic() - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.abort()
        return None

    def give_back(self, origin: Origin, connection: Connection) -> None:
        """Keeps it for the next request if it can carry one."""
        if not connection.alive:
            connection.abort()
            return
        if self._idle_count >= MAX_IDLE:
            self._prune()
        connection.idle_since = time.monotonic()
        self._idle.setdefault(origin, deque()).append(connection)
        self._idle_count += 1

    async def connect(self, origin: Origin, timeout_s: float) -> Connection:
        """Tries the origin's addresses in turn, for `timeout_s` or the pool's own limit, whichever is less. Raises
        SendError; nothing was sent then."""
        failure = SendError(ErrorType.DNS_ERROR, f"{origin.host} has no address")
        started = time.monotonic()
        limit = min(timeout_s, self._connect_timeout_s)
        for index, address in enumerate(origin.addresses):
            left = limit - (time.monotonic() - started)
            budget = left / (len(origin.addresses) - index)
            try:
                return await self._connect_to(origin, address, budget)
            except SendError as error:
                failure = error
        failure.timing = Timing(response_us=int((time.monotonic() - started) * 1e6))
        raise failure

    def close(self) -> None:
        for idle in self._idle.values():
            for connection in idle:
                connection.abort()
        self._idle.clear()
        self._idle_count = 0

    def _prune(self) -> None:
        """Drops the dead and the long idle, and if that is nothing, the oldest half."""
        now = time.monotonic()
        kept: list[tuple[float, Origin, Connection]] = []
        for origin, idle in self._idle.items():
            kept.extend((connection.idle_since, origin, connection) for connection in idle)
        kept.sort(key=lambda entry: entry[0], reverse=True)
        self._idle = {}
        self._idle_count = 0
        for since, origin, connection in kept:
            if connection.alive and now - since < MAX_IDLE_S and self._idle_count < MAX_IDLE // 2:
                self._idle.setdefault(origin, deque()).appendleft(connection)
                self._idle_count += 1
            else:
                connection.abort()

    async def _connect_to(self, origin: Origin, address: str, budget: float) -> Connection:
        loop = asyncio.get_running_loop()
        step = f"connecting to {_show(address, origin.port)}"
        started = time.monotonic()
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(max(budget, 0.001)):
                sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
                sock.setblocking(False)
                await loop.sock_connect(sock, (address, origin.port))
                connected = time.monotonic()
                connection = Connection(loop, sni=origin.server_name)
                connection.connect_us = int((connected - started) * 1e6)
                if origin.scheme == "http":
                    await loop.create_connection(lambda: connection, sock=sock)
                else:
                    step = f"the TLS handshake with {origin}"
                    await loop.create_connection(
                        lambda: connection,
                        sock=sock,
                        ssl=self._tls.get(origin.verify),
                        server_hostname=origin.server_name,
                    )
                    connection.tls_us = int((time.monotonic() - connected) * 1e6)
                sock = None  # the transport owns it now
                return connection
        except TimeoutError as error:
            raise SendError(ErrorType.TIMEOUT, f"{step} took too long ({time.monotonic() - started:.1f} s)") from error
        except ssl.SSLError as error:
            raise SendError(ErrorType.SSL_ERROR, f"{step} failed: {_ssl_reason(error)}") from error
        except OSError as error:
            raise SendError(ErrorType.CONNECTION_RESET, f"{step} failed: {_os_reason(error)}") from error
        finally:
            if sock is not None:
                sock.close()


def _show(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _ssl_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted, {error.verify_message}"
    return error.reason or str(error)


def _os_reason(error: OSError) -> str:
    """The system's words: asyncio puts its own in `strerror`."""
    return os.strerror(error.errno) if error.errno else str(error) or "the server closed the connection"
