"""A server that speaks no HTTP: it hands each connection's bytes to a script and keeps what it received."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Talk:
    """One connection as the script sees it. `received` has every byte that was read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.received = bytearray()

    async def head(self) -> bytes:
        """The next request's head, its empty line included."""
        return self._keep(await self._reader.readuntil(b"\r\n\r\n"))

    async def exactly(self, count: int) -> bytes:
        return self._keep(await self._reader.readexactly(count))

    async def some(self) -> bytes:
        """What came, at least a byte."""
        piece = await self._reader.read(65536)
        if not piece:
            raise asyncio.IncompleteReadError(b"", None)
        return self._keep(piece)

    async def until(self, end: bytes) -> bytes:
        return self._keep(await self._reader.readuntil(end))

    async def rest(self) -> bytes:
        return self._keep(await self._reader.read(-1))

    async def say(self, *pieces: bytes) -> None:
        """Writes each piece by itself, so that the client reads it by itself."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            if len(pieces) > 1:
                await asyncio.sleep(0.002)

    def reset(self) -> None:
        self.writer.transport.abort()

    def _keep(self, data: bytes) -> bytes:
        self.received += data
        return data


type Script = Callable[[Talk], Awaitable[None]]


class RawServer:
    """`async with RawServer(script) as server`: `port`, and `talks`, one for each connection."""

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self._script = script
        self._tls = tls
        self._host = host
        self.talks: list[Talk] = []
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0, ssl=self._tls, limit=1 << 24)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    @property
    def received(self) -> list[bytes]:
        return [bytes(talk.received) for talk in self.talks]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        talk = Talk(reader, writer)
        self.talks.append(talk)
        try:
            await self._script(talk)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()
