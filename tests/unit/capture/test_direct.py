"""Data handled where the transport brings it, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from mitmproxy import connection
from mitmproxy.proxy import events
from mitmproxy.proxy.server import ConnectionIO

from megido_capture.mitm.fastpath import direct
from tests.integration.capture.harness import until

MB = 1 << 20


@dataclass
class Handler:
    """What a reader needs of one."""

    transports: dict[connection.Connection, ConnectionIO] = field(default_factory=dict)
    throttle: direct.Throttle = field(default_factory=direct.Throttle)
    data: bytearray = field(default_factory=bytearray)
    closed: list[connection.Connection] = field(default_factory=list)

    def handle(self, event: events.Event) -> None:
        assert isinstance(event, events.DataReceived)
        self.data += event.data

    def closed_by_peer(self, ended: connection.Connection) -> None:
        self.closed.append(ended)


@dataclass
class Pair:
    """A connection of the handler, and its peer."""

    handler: Handler
    conn: connection.Server
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    peer_reader: asyncio.StreamReader
    peer: asyncio.StreamWriter


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    came: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: came.set_result((r, w)), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address)
    peer_reader, peer = await came
    handler, conn = Handler(), connection.Server(address=address)
    handler.transports[conn] = ConnectionIO(reader=reader, writer=writer)
    yield Pair(handler, conn, reader, writer, peer_reader, peer)
    peer.transport.abort()
    writer.transport.abort()
    server.close()


def begin(pair: Pair) -> asyncio.Task[bytes]:
    assert direct.take_over(pair.handler, pair.conn) is pair.reader  # type: ignore[arg-type]
    return asyncio.create_task(pair.reader.read(65_535))


async def test_what_came_before_and_what_comes(pair: Pair) -> None:
    pair.peer.write(b"before")
    await until(_value(lambda: bytes(pair.reader._buffer)), lambda buffer: buffer == b"before")  # type: ignore[attr-defined]
    assert await begin(pair) == b"before"
    reading = asyncio.create_task(pair.reader.read(65_535))
    await asyncio.sleep(0)
    pair.peer.write(bytes(3 * MB))
    pair.peer.write_eof()
    assert await asyncio.wait_for(reading, 20) == b""
    assert len(pair.handler.data) == 3 * MB and pair.handler.closed == [pair.conn]


async def test_a_reset_is_an_error_that_the_stream_knows(pair: Pair) -> None:
    reading = begin(pair)
    await asyncio.sleep(0)
    pair.writer.write(b"unread")
    await until(_value(lambda: bytes(pair.peer_reader._buffer)), bool)  # type: ignore[attr-defined]
    pair.peer.get_extra_info("socket").setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER 0
    pair.peer.transport.abort()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reading, 20)
    assert isinstance(pair.reader.exception(), ConnectionResetError) and pair.handler.closed == [pair.conn]


async def test_one_that_is_cancelled_reads_as_a_stream_again(pair: Pair) -> None:
    reading = begin(pair)
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    pair.peer.write(b"last words")
    assert await asyncio.wait_for(pair.reader.read(65_535), 20) == b"last words"
    assert not pair.handler.data and not pair.handler.closed


async def test_what_was_written_before_holds_the_others_up_too(pair: Pair) -> None:
    pair.peer.transport.pause_reading()  # type: ignore[attr-defined]
    pair.writer.write(bytes(32 * MB))
    reading = begin(pair)
    await asyncio.sleep(0)
    assert pair.handler.throttle.is_on()
    pair.peer.write(b"x")
    await until(_value(lambda: bytes(pair.handler.data)), bool)  # the piece that is there, and nothing behind it
    assert not pair.writer.transport.is_reading()  # type: ignore[attr-defined]
    pair.peer.transport.resume_reading()  # type: ignore[attr-defined]
    await asyncio.wait_for(pair.peer_reader.readexactly(32 * MB), 60)
    assert not pair.handler.throttle.is_on() and pair.writer.transport.is_reading()  # type: ignore[attr-defined]
    reading.cancel()


def _value[T](read: Callable[[], T]) -> Callable[[], Awaitable[T]]:
    async def answer() -> T:
        return read()

    return answer
