"""A TCP proxy between two services, whose network a test can spoil while it is in use."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

PIECE = 64 * 1024


class TcpProxy:
    """`async with tcp_proxy(port) as proxy`: listens on `proxy.port`, forwards to `port` on loopback.

    `delay` seconds hold back every piece, `rate` bytes a second bound each direction of each connection (0: no bound),
    `hole` swallows nothing but lets nothing through either: connects succeed and then nobody answers. All may be
    changed at any time.
    """

    def __init__(self, to: int) -> None:
        self.delay = 0.0
        self.rate = 0
        self._to = to
        self._through = asyncio.Event()
        self._through.set()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self.port = 0
        self.accepted = 0

    @property
    def hole(self) -> bool:
        return not self._through.is_set()

    @hole.setter
    def hole(self, value: bool) -> None:
        if value:
            self._through.clear()
        else:
            self._through.set()

    async def open(self) -> None:
        """Listens, again on the same port after `refuse`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Cuts everything; new connects are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.reset()

    async def reset(self) -> None:
        """Resets every connection (RST); new ones are welcome."""
        tasks = list(self._connections)
        for writers in self._connections.values():
            for writer in writers:
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # l_onoff 1, l_linger 0
                with contextlib.suppress(OSError):
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        writers = self._connections[task] = [writer]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                back, forth = await asyncio.open_connection("127.0.0.1", self._to)
                writers.append(forth)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, forth))
                    group.create_task(self._pump(back, writer))
            except* OSError:
                pass  # one side has gone, and so goes the other
            finally:
                for open_writer in writers:
                    open_writer.transport.abort()
                del self._connections[task]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE):
            await self._through.wait()
            if self.delay:
                await asyncio.sleep(self.delay)
            if self.rate:
                await asyncio.sleep(len(data) / self.rate)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # ends the other direction too


@contextlib.asynccontextmanager
async def tcp_proxy(to: int) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(to)
    await proxy.open()
    try:
        yield proxy
    finally:
        proxy.hole = False
        await proxy.refuse()
