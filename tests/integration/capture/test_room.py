"""A full proxy makes room for a new client: who is told to go, and who never is."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.capture.harness import Proxy, capture, curl, until
from tests.integration.capture.test_limits import Streams, closed, connected, counted, get, url
from tests.integration.capture.upstream import Upstream
from tests.support.raw_server import RawServer, Talk

pytestmark = pytest.mark.timeout(120)

OPEN = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
PIECE = b"x" * 1000
HANDSHAKE = (
    b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
USER = b"Proxy-Authorization: Basic " + base64.b64encode(b"user:right") + b"\r\n"


@contextlib.asynccontextmanager
async def trickling(proxy: Proxy, count: int, first: bytes, piece: bytes) -> AsyncIterator[list[Streams]]:
    """Clients that send a little now and then, and never a request."""

    async def trickle(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.05)

    async with connected(proxy, count, first) as made:
        tasks = [asyncio.create_task(trickle(writer)) for _, writer in made]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def in_steps(talk: Talk) -> None:
    """An answer that goes on when the client says so."""
    head = await talk.head()
    if b"upgrade" in head.lower():
        await talk.say(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        await talk.rest()
    await talk.say(OPEN)
    while True:
        await talk.say(PIECE)
        await asyncio.sleep(0.05)


async def echo(talk: Talk) -> None:
    while True:
        await talk.say(await talk.some())


@pytest.mark.parametrize(
    ("first", "piece"),
    [(b"GET http://127.0.0.1/ HTTP/1.1\r\nX: ", b"a"), (b"", b"\r\n")],
    ids=["a head", "empty lines"],
)
async def test_trickling_clients_give_way(tmp_path: Path, upstream: Upstream, first: bytes, piece: bytes) -> None:
    """Long before `header_timeout`, which is 30 seconds here."""
    async with capture(tmp_path, "--max-concurrent-clients", "20") as proxy, trickling(proxy, 20, first, piece):
        await until(lambda: curl(proxy, url(upstream)), lambda answer: answer.status == 200)
        for number in range(5):
            assert (await curl(proxy, url(upstream, f"plain/{number}"))).status == 200
        assert 1 <= await counted(proxy, "evicted_clients") <= 6
        assert await counted(proxy, "header_timeouts") == 0


async def test_who_makes_use_of_its_place_keeps_it(tmp_path: Path, upstream: Upstream) -> None:
    """An open download, a WebSocket and a raw tunnel, of which only the first is a flow that goes on."""
    async with (
        RawServer(in_steps) as server,
        RawServer(echo) as raw,
        capture(tmp_path, "--max-concurrent-clients", "5") as proxy,
        connected(proxy, 1, b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % server.port) as [(download, _)],
        connected(proxy, 1, HANDSHAKE % server.port) as [(ws, _)],
        connected(proxy, 1, b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % raw.port) as [(tunnel, said)],
    ):
        for reader in (download, ws, tunnel):
            await reader.readuntil(b"\r\n\r\n")
        said.write(b"\x00\x01first")
        await tunnel.readuntil(b"first")
        async with trickling(proxy, 2, b"GET ", b"a") as noise:
            await until(lambda: curl(proxy, url(upstream)), lambda answer: answer.status == 200)
            assert any([await closed(reader, 0.1) for reader, _ in noise])
        for _ in range(4):
            assert (await curl(proxy, url(upstream))).status == 200
        await download.readexactly(10 * len(PIECE))
        said.write(b"second")
        await tunnel.readuntil(b"second")
        assert not await closed(ws, 0.1)


async def test_who_is_not_authenticated_goes_first(tmp_path: Path, upstream: Upstream) -> None:
    """Though the one that is has had no request for longer: what is refused is no use of a place."""
    options = ("--auth-required", "--auth-username", "user", "--auth-password", "right")
    asked = get(upstream, "plain/1")
    allowed = asked[:-2] + USER + b"\r\n"
    async with (
        capture(tmp_path, "--max-concurrent-clients", "3", *options) as proxy,
        connected(proxy, 2, asked) as strangers,
        connected(proxy, 1, allowed) as [(known, writer)],
    ):
        await known.readuntil(b'"answer": "1"}')
        for stranger, asks_again in strangers:
            asks_again.write(asked)
            for _ in range(2):
                assert b" 407 " in await stranger.readuntil(b"\r\n\r\n")
        await until(
            lambda: curl(proxy, url(upstream), "--proxy-user", "user:right"), lambda answer: answer.status == 200
        )
        assert await counted(proxy, "evicted_clients") == 1
        writer.write(allowed)
        await known.readuntil(b'"answer": "1"}')
