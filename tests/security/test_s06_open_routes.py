"""Line 6, while it runs: what is blocked from now on is left by the connections that are open, on both sides."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.server import ServerConnection, serve

from megido_shared.events import ErrorRaised, FlowCompleted, FlowFailed
from tests.integration.capture.harness import body, capture, flows
from tests.integration.capture.test_liveconfig import Live
from tests.support.raw_server import OK, RawServer, Talk

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    async with capture(tmp_path / "data") as proxy:
        yield Live(proxy)


async def echoing(talk: Talk) -> None:
    while True:
        await talk.say(await talk.some())


async def answering(talk: Talk) -> None:
    while True:
        await talk.head()
        await talk.say(OK)


async def silent(talk: Talk) -> None:
    await talk.head()
    await talk.rest()


async def without_end(talk: Talk) -> None:
    await talk.head()
    await talk.say(b"HTTP/1.1 200 OK\r\n\r\nbegin")
    await talk.rest()


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, live: Live) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", live.proxy.port))

    async def tunnel(self, port: int) -> "Client":
        self.writer.write(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in await self.reader.readuntil(b"\r\n\r\n")
        return self

    def ask(self, port: int) -> None:
        self.writer.write(f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())

    async def get(self, port: int) -> bytes:
        self.ask(port)
        return await self.read(len(OK))

    async def echo(self, text: bytes = b"\0\1\2") -> bool:
        self.writer.write(text)
        return await self.read(len(text)) == text

    async def read(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), 30)

    async def rest(self) -> bytes:
        """Until the proxy has closed."""
        try:
            return await asyncio.wait_for(self.reader.read(-1), 30)
        except ConnectionResetError:
            return b""


def alone(port: int) -> dict[str, Any]:
    return {"blocked_destinations": f"elsewhere.example, 127.0.0.0/8:{port}"}


def failures(events: list[Any]) -> list[str]:
    return [event.failure.message for event in events if isinstance(event, FlowFailed | ErrorRaised)]


async def gone(talk: Talk) -> None:
    """The server's side is closed too."""
    async with asyncio.timeout(30):
        while not talk.writer.transport.is_closing():
            await asyncio.sleep(0.01)


async def test_a_tunnel(live: Live) -> None:
    async with RawServer(echoing) as server, RawServer(echoing) as other:
        blocked = await (await Client.of(live)).tunnel(server.port)
        stays = await (await Client.of(live)).tunnel(other.port)
        assert await blocked.echo() and await stays.echo()
        await live.set(**alone(server.port))
        assert await blocked.rest() == b""
        await gone(server.talks[0])
        [message] = failures(await live.proxy.until(lambda events: bool(failures(events))))
        assert f"127.0.0.1:{server.port} is not reachable" in message and "blocked_destinations" in message
        assert await stays.echo()
        await live.status(lambda status: status.counters.get("cut_destinations") == 1)


async def test_a_websocket(live: Live) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0) as server, serve(echo, "127.0.0.1", 0) as other:
        port, kept = (next(iter(one.sockets)).getsockname()[1] for one in (server, other))
        async with (
            websockets.connect(f"ws://127.0.0.1:{port}/", proxy=live.proxy.url) as blocked,
            websockets.connect(f"ws://127.0.0.1:{kept}/", proxy=live.proxy.url) as stays,
        ):
            for client in (blocked, stays):
                await client.send("before")
                assert await client.recv() == "before"
            await live.set(**alone(port))
            with pytest.raises(websockets.ConnectionClosed):
                await asyncio.wait_for(blocked.recv(), 30)
            [message] = failures(await live.proxy.until(lambda events: bool(failures(events))))
            assert "blocked_destinations" in message
            await stays.send("after")
            assert await stays.recv() == "after"


async def test_a_kept_connection_that_is_idle_is_closed_and_no_failure(live: Live) -> None:
    async with RawServer(answering) as server, RawServer(answering) as other:
        blocked, stays = await Client.of(live), await Client.of(live)
        assert await blocked.get(server.port) == OK and await stays.get(other.port) == OK
        await live.set(**alone(server.port))
        assert await blocked.rest() == b""
        await gone(server.talks[0])
        assert await stays.get(other.port) == OK and len(other.talks) == 1
        assert failures(await live.proxy.events()) == []


async def test_a_client_that_is_busy_elsewhere_stays(live: Live) -> None:
    """Its connection is used for two servers in turn, as browsers use a proxy's."""
    async with RawServer(answering) as server, RawServer(silent) as other:
        client = await Client.of(live)
        assert await client.get(server.port) == OK
        client.ask(other.port)
        async with asyncio.timeout(30):
            while not other.talks or not other.talks[0].received:
                await asyncio.sleep(0.01)
        await live.set(**alone(server.port))
        await gone(server.talks[0])
        await other.talks[0].say(OK)
        assert await client.read(len(OK)) == OK
        assert len(flows(await live.proxy.events(), FlowCompleted)) == 2


async def test_a_request_without_an_answer_gets_one_and_fails_once(live: Live) -> None:
    async with RawServer(silent) as server:
        client = await Client.of(live)
        client.ask(server.port)
        async with asyncio.timeout(30):
            while not server.talks or not server.talks[0].received:
                await asyncio.sleep(0.01)
        await live.set(**alone(server.port))
        assert (await client.rest()).startswith(b"HTTP/1.1 502 ")
        found = await live.proxy.until(lambda events: bool(failures(events)))
        [failed] = flows(found, FlowFailed)
        assert "blocked_destinations" in failed.failure.message and len(failures(found)) == 1


async def test_a_body_that_ends_with_its_connection_fails_once(live: Live) -> None:
    """Otherwise nothing would tell that its end was ours."""
    async with RawServer(without_end) as server:
        client = await Client.of(live)
        client.ask(server.port)
        async with asyncio.timeout(30):
            await client.reader.readuntil(b"begin")
        await live.set(**alone(server.port))
        await client.rest()
        found = await live.proxy.until(lambda events: bool(failures(events)))
        [failed] = flows(found, FlowFailed)
        assert "blocked_destinations" in failed.failure.message and body(found, failed) == b"begin"
        assert len(failures(found)) == 1 and not flows(found)


async def test_behind_another_proxy_by_what_it_was_told(tmp_path: Path) -> None:
    async def chained(talk: Talk) -> None:
        await talk.head()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\n")
        await echoing(talk)

    async with RawServer(chained) as server, contextlib.AsyncExitStack() as stack:
        options = ("--mode", f"upstream:http://127.0.0.1:{server.port}")
        live = Live(await stack.enter_async_context(capture(tmp_path / "data", *options)))
        blocked = await (await Client.of(live)).tunnel(1234)
        stays = await (await Client.of(live)).tunnel(1235)
        assert await blocked.echo() and await stays.echo()
        await live.set(**alone(1234))
        assert await blocked.rest() == b"" and await stays.echo()
        [message] = failures(await live.proxy.until(lambda events: bool(failures(events))))
        assert "127.0.0.1:1234 is not reachable" in message
