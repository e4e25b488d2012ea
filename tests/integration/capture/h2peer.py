"""One side of an HTTP/2 connection whose flow control the test holds in its hands."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events

from tests.integration.capture.harness import Proxy
from tests.support.inside import Inside

FRAME = 16_384
STALLED = 1.0
"""Seconds without room after which a sender says that it is held up."""


class Stream:
    """What came on one stream."""

    def __init__(self) -> None:
        self.headers: list[tuple[str, str]] = []
        self.informational: list[list[tuple[str, str]]] = []
        self.trailers: list[tuple[str, str]] = []
        self.data = bytearray()
        self.size = 0
        self.ended = False
        self.reset: int | None = None
        self.unread = 0
        """Bytes that came and were not acknowledged: `paused` streams take no more than their window."""


class H2Peer:
    """`take` gets the data of every stream instead of `Stream.data`. What comes on a stream in `paused` is not
    acknowledged, so its sender stops when the window is used up."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        client: bool,
        window: int = 65_535,
        take: Callable[[int, bytes], None] | None = None,
    ) -> None:
        self._reader = reader
        self.writer = writer
        self.conn = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=client, header_encoding="utf-8", validate_inbound_headers=False)
        )
        self.conn.local_settings.initial_window_size = window
        self.conn.local_settings.acknowledge()  # else the first settings frame says the old size
        self.streams: dict[int, Stream] = {}
        self.paused: set[int] = set()
        self.pause_all = False
        self._take = take
        self._changed = asyncio.Condition()
        self.conn.initiate_connection()
        if window > 65_535:
            self.conn.increment_flow_control_window((1 << 30) - 65_535)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await self.flush()
            while data := await self._reader.read(65_536):
                for event in self.conn.receive_data(data):
                    self._on(event)
                await self.flush()
                async with self._changed:
                    self._changed.notify_all()

    def _on(self, event: h2.events.Event) -> None:
        number = getattr(event, "stream_id", None)
        if not number:
            return
        stream = self.streams.setdefault(number, Stream())
        match event:
            case h2.events.RequestReceived() | h2.events.ResponseReceived():
                stream.headers = list(event.headers)
            case h2.events.InformationalResponseReceived():
                stream.informational.append(list(event.headers))
            case h2.events.TrailersReceived():
                stream.trailers = list(event.headers)
            case h2.events.DataReceived():
                stream.size += len(event.data)
                if self._take is None:
                    stream.data += event.data
                else:
                    self._take(number, event.data)
                stream.unread += event.flow_controlled_length
                if not self.pause_all and number not in self.paused:
                    self._acknowledge(number)
            case h2.events.StreamEnded():
                stream.ended = True
            case h2.events.StreamReset():
                stream.reset, stream.ended = int(event.error_code), True

    def _acknowledge(self, number: int) -> None:
        stream = self.streams[number]
        self.conn.acknowledge_received_data(stream.unread, number)
        stream.unread = 0

    async def resume(self, number: int) -> None:
        """Reads on."""
        self.paused.discard(number)
        self.pause_all = False
        self._acknowledge(number)
        await self.flush()

    async def flush(self) -> None:
        self.writer.write(self.conn.data_to_send())
        await self.writer.drain()

    async def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(condition)

    async def head(self, number: int, fields: Iterable[tuple[str, str]], *, end: bool = False) -> None:
        self.conn.send_headers(number, list(fields), end_stream=end)
        await self.flush()

    async def body(
        self,
        number: int,
        pieces: Iterable[bytes],
        *,
        sent: list[int] | None = None,
        stalled: asyncio.Event | None = None,
    ) -> None:
        """Sends what the peer's window lets it, as it lets it, and the end. `sent` gets the bytes so far."""
        stalled = stalled or asyncio.Event()
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                room = min(self.conn.local_flow_control_window(number), FRAME, len(rest))
                if room <= 0:
                    await patiently(self._window(number), stalled)
                    continue
                self.conn.send_data(number, bytes(rest[:room]))
                rest = rest[room:]
                await patiently(self.flush(), stalled)
                if sent is not None:
                    sent[0] += room
        self.conn.end_stream(number)
        await self.flush()

    async def data(self, number: int, data: bytes) -> None:
        """A piece that surely fits."""
        self.conn.send_data(number, data)
        await self.flush()

    async def _window(self, number: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.conn.local_flow_control_window(number) > 0)

    async def close(self) -> None:
        self.writer.close()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def patiently(waiting: Coroutine[Any, Any, Any], stalled: asyncio.Event) -> None:
    """Waits, and says so when it takes long."""
    task = asyncio.create_task(waiting)
    done, _ = await asyncio.wait({task}, timeout=STALLED)
    if not done:
        stalled.set()
    await task


async def dial(proxy: Proxy | Inside) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the proxy of which the kernel holds little."""
    sock = socket.socket()
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 1 << 18)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", proxy.port))
    return await asyncio.open_connection(sock=sock)


async def connect(proxy: Proxy | Inside, port: int, **more: Any) -> H2Peer:
    """A client that speaks HTTP/2 to the proxy, inside a CONNECT to `port` of loopback."""
    reader, writer = await dial(proxy)
    writer.write(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % port)
    assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    context = ssl.create_default_context(cafile=str(proxy.ca))
    context.set_alpn_protocols(["h2"])
    await writer.start_tls(context, server_hostname="127.0.0.1")
    return H2Peer(reader, writer, client=True, **more)


def request(port: int, path: str, method: str = "GET", *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [(":method", method), (":scheme", "https"), (":authority", f"127.0.0.1:{port}"), (":path", path), *more]
