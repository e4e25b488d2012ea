"""How a WebSocket connection ends, from either side, and that its end is always recorded."""

import asyncio
import signal
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from megido_shared.events import WebSocketMessage
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import Proxy, capture, flows, start
from tests.integration.capture.raw_websocket import BINARY, TEXT, Peer, client, close, frame, serving


def messages(found: list[Any]) -> list[WebSocketMessage]:
    return flows(found, WebSocketMessage)


def ended(found: list[Any]) -> bool:
    return any(message.message_type == "CLOSE" for message in messages(found))


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, ""),
        (1000, ""),
        (1001, "leaving"),
        (1011, "é" * 61),
        (1014, "bad gateway"),
        (2000, "later"),
        (4999, "own"),
    ],
)
async def test_code_and_reason_reach_the_other_side_and_the_record(
    proxy: Proxy, sender: str, code: int | None, reason: str
) -> None:
    async with serving() as server:
        ours = await client(proxy, server.port)
        theirs = await server.peer()
        here, there = (ours, theirs) if sender == "client" else (theirs, ours)
        await here.send(close(code, reason.encode(), mask=sender == "client"))
        back, got = await asyncio.gather(here.until_end(), there.until_end())
    assert back.close == got.close == (code or 1005, reason.encode())
    [last] = messages(await proxy.until(ended))
    assert (last.message_type, last.close_code, last.close_reason) == ("CLOSE", code or 1005, reason)
    assert last.direction == ("SEND" if sender == "client" else "RECEIVE")


def leave(peer: Peer) -> None:
    peer.writer.write_eof()


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize("how", [Peer.reset, leave])
async def test_a_lost_connection_is_lost_on_the_other_side_too(
    proxy: Proxy, sender: str, how: Callable[[Peer], None]
) -> None:
    """A CLOSE that nobody sent would tell it that the end was wanted: clients then do not connect again."""
    async with serving() as server:
        ours = await client(proxy, server.port)
        theirs = await server.peer()
        here, there = (ours, theirs) if sender == "client" else (theirs, ours)
        await here.send(frame(TEXT, b"last words", mask=sender == "client"))
        assert (await there.frame())[1] == b"last words"
        how(here)
        assert (await there.until_end()).close is None
    [first, last] = messages(await proxy.until(ended))
    direction = "SEND" if sender == "client" else "RECEIVE"
    assert (first.direction, first.payload) == (direction, b"last words")
    assert (last.direction, last.close_code, last.sequence) == (direction, 1006, 1)


async def test_over_tls_too(proxy: Proxy, authority: trustme.CA) -> None:
    async def wait(connection: ServerConnection) -> None:
        await connection.wait_closed()
        codes.append((connection.close_code, connection.close_reason))
        seen.set()

    codes: list[Any] = []
    ours = ssl.create_default_context(cafile=str(proxy.ca))
    async with serve(wait, "127.0.0.1", 0, ssl=server_context(authority, "localhost")) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        for leave in ("close", "cut"):
            seen = asyncio.Event()
            now = proxy.from_now()
            found = await connect(f"wss://localhost:{port}/", proxy=proxy.url, ssl=ours)
            if leave == "close":
                await found.close(4321, "bye")
            else:
                found.transport.abort()
            await asyncio.wait_for(seen.wait(), 20)
            [last] = messages(await now.until(ended))
            assert (last.close_code, last.close_reason, last.direction) == (
                (4321, "bye", "SEND") if leave == "close" else (1006, "", "SEND")
            )
    assert codes == [(4321, "bye"), (1006, "")]


async def test_a_peer_that_still_sends_reads_its_close(proxy: Proxy) -> None:
    """Closed at once, the connection would be reset by what is on its way, and the CLOSE lost."""
    async with serving() as server:
        ours = await client(proxy, server.port)
        theirs = await server.peer()
        sending = asyncio.ensure_future(stream(theirs))
        await ours.frame()
        await ours.send(close(4000, b"enough"))
        got = await theirs.until_end()
        sending.cancel()
        assert got.close == (4000, b"enough")
    last = messages(await proxy.until(ended))[-1]
    assert (last.message_type, last.close_code, last.direction) == ("CLOSE", 4000, "SEND")


async def stream(peer: Peer) -> None:
    while True:
        await peer.send(frame(BINARY, bytes(60_000), mask=False))
        await asyncio.sleep(0)


async def test_a_proxy_that_stops_says_so(tmp_path: Path) -> None:
    async with serving() as server:
        async with capture(tmp_path) as proxy:
            ours = await client(proxy, server.port)
            theirs = await server.peer()
            await ours.send(frame(TEXT, b"hello"))
            await theirs.frame()
            stopping = asyncio.ensure_future(asyncio.to_thread(proxy.stop))
            told = await asyncio.gather(ours.until_end(), theirs.until_end())
            assert await stopping == 0
        assert [peer.close for peer in told] == [(1001, b"the proxy stops")] * 2
        last = messages(await proxy.events())[-1]
    assert (last.message_type, last.close_code, last.sequence) == ("CLOSE", 1001, 1)


async def test_after_a_kill_the_next_life_records_the_end(tmp_path: Path) -> None:
    """Of the connections that were open, and once."""
    async with serving() as server:
        proxy = await asyncio.to_thread(start, tmp_path)
        cut, done = await client(proxy, server.port), await client(proxy, server.port)
        for peer in (cut, done):
            await peer.send(frame(TEXT, b"hello"), frame(BINARY, b"\xacmessage_type\xa5CLOSE"))
        await done.send(close(1000))
        await done.until_end()
        await proxy.until(lambda found: len(messages(found)) == 5)
        proxy.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(proxy.process.wait)
    for _ in range(2):
        async with capture(tmp_path) as later:
            await later.until(lambda found: len(messages(found)) >= 6)
    ends = [m for m in messages(await later.events()) if m.message_type == "CLOSE"]
    assert sorted((m.close_code, m.close_reason, m.sequence) for m in ends) == [
        (1000, "", 2),
        (1006, "the proxy was killed", 2),
    ]
    assert len({m.connection_id for m in ends}) == 2
