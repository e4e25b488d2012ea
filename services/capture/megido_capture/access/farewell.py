"""Tells a client that is not served why, in words, and lets it go."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from mitmproxy import connection
from mitmproxy.proxy.server import ConnectionIO

LINGER = 2.0
MAX_LINGERING = 100
"""So many refused clients are waited for, each so long, to read their request: closed at once, its connection would
be reset and the answer lost. Further ones are closed at once."""

type TransportOf = Callable[[connection.Client], ConnectionIO | None]


class Farewell:
    def __init__(self, transport: TransportOf) -> None:
        self.transport = transport
        self._lingering = 0

    async def say(self, client: connection.Client, status: HTTPStatus, text: str, *fields: str) -> None:
        """Answers the request of a client that mitmproxy has not begun to read, if it is one in plain HTTP. To be
        called in `client_connected`, with `client.error` set: mitmproxy closes the connection after it."""
        io = self.transport(client)
        if io is None or not isinstance(io.reader, asyncio.StreamReader) or self._lingering >= MAX_LINGERING:
            return
        assert isinstance(io.writer, asyncio.StreamWriter)
        self._lingering += 1
        try:
            async with asyncio.timeout(LINGER):
                if (await io.reader.read(65535))[:1].isalpha():  # neither TLS nor SOCKS
                    io.writer.write(answer(status, text, *fields))
                    io.writer.write_eof()
                    while await io.reader.read(65535):
                        pass
        except (TimeoutError, OSError):
            pass
        finally:
            self._lingering -= 1


def answer(status: HTTPStatus, text: str, *fields: str) -> bytes:
    """A whole HTTP/1.1 response that ends its connection."""
    body = f"{text}\n".encode()
    head = [
        f"HTTP/1.1 {status} {status.phrase}",
        "Content-Type: text/plain; charset=utf-8",
        *fields,
        "Connection: close",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def cut(transport: TransportOf, client: connection.Client, why: str) -> bool:
    """Ends a connection through its handler's task: mitmproxy has no call for it. False when there is none."""
    io = transport(client)
    return io is not None and io.handler is not None and io.handler.cancel(why)
