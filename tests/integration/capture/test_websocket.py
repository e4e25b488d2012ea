"""WebSocket conversations, frame by frame, over WS and WSS."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme
import websockets
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from megido_shared.events import WebSocketMessage
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import Proxy, capture, flows


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)
        if message == "ping me":
            await (await connection.ping(b"from the server"))


@contextlib.asynccontextmanager
async def echoing(tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    async with serve(echo, "127.0.0.1", 0, ssl=tls, max_size=None) as server:
        yield next(iter(server.sockets)).getsockname()[1]


def messages(found: list[Any]) -> list[WebSocketMessage]:
    return flows(found, WebSocketMessage)


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_conversation(proxy: Proxy, authority: trustme.CA, scheme: str) -> None:
    tls = server_context(authority, "localhost") if scheme == "wss" else None
    ours = ssl.create_default_context(cafile=str(proxy.ca)) if scheme == "wss" else None
    async with echoing(tls) as port:
        url = f"{scheme}://localhost:{port}/chat?room=1"
        async with connect(url, proxy=proxy.url, ssl=ours, ping_interval=None) as client:
            await client.send("hello é")
            assert await client.recv() == "hello é"
            await client.send(b"\x00\xff\x80")
            assert await client.recv() == b"\x00\xff\x80"
            await (await client.ping(b"are you there"))
            await client.send(["fragm", "ented"])
            assert await client.recv() == "fragmented"
            await client.send("ping me")
            assert await client.recv() == "ping me"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.recv(), 0.3)  # answers the server's ping meanwhile
            await client.close(4001, "done here")
    found = await proxy.until(lambda events: any(m.message_type == "CLOSE" for m in messages(events)))
    sent = [(m.direction, m.message_type, m.payload) for m in messages(found)]
    assert sent == [
        ("SEND", "TEXT", "hello é".encode()),
        ("RECEIVE", "TEXT", "hello é".encode()),
        ("SEND", "BINARY", b"\x00\xff\x80"),
        ("RECEIVE", "BINARY", b"\x00\xff\x80"),
        ("SEND", "PING", b"are you there"),
        ("RECEIVE", "PONG", b"are you there"),
        ("SEND", "TEXT", b"fragmented"),
        ("RECEIVE", "TEXT", b"fragmented"),
        ("SEND", "TEXT", b"ping me"),
        ("RECEIVE", "TEXT", b"ping me"),
        ("RECEIVE", "PING", b"from the server"),
        ("SEND", "PONG", b"from the server"),
        ("SEND", "CLOSE", b""),
    ]
    assert [m.sequence for m in messages(found)] == list(range(len(sent)))
    [handshake] = flows(found)
    assert (handshake.request.scheme, handshake.response.status) == (scheme, 101)
    last = messages(found)[-1]
    assert (last.close_code, last.close_reason) == (4001, "done here")
    assert {(m.flow_id, m.url, m.client.ip) for m in messages(found)} == {(handshake.flow_id, url, "127.0.0.1")}
    assert last.connection_id == "ws_" + handshake.flow_id.hex()


async def test_compressed_messages_are_recorded_as_sent(proxy: Proxy) -> None:
    async with (
        echoing() as port,
        connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url, compression="deflate") as client,
    ):
        await client.send("x" * 10_000)
        await client.recv()
    found = await proxy.until(lambda events: any(m.message_type == "CLOSE" for m in messages(events)))
    assert [m.size for m in messages(found)] == [10_000, 10_000, 0]


async def test_connection_that_is_cut(proxy: Proxy) -> None:
    async with echoing() as port:
        client = await connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url)
        await client.send("last words")
        await client.recv()
        client.transport.abort()
    found = await proxy.until(lambda events: any(m.message_type == "CLOSE" for m in messages(events)))
    assert (messages(found)[-1].close_code, messages(found)[-1].direction) == (1006, "SEND")


async def test_large_message_is_cut_in_the_record_only(proxy: Proxy) -> None:
    payload = b"y" * 1_500_000
    async with echoing() as port, connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url, max_size=None) as client:
        await client.send(payload)
        assert await client.recv() == payload
    found = await proxy.until(lambda events: any(m.message_type == "CLOSE" for m in messages(events)))
    first = messages(found)[0]
    assert (first.size, first.truncated) == (len(payload), True) and 0 < len(first.payload) < len(payload)


async def test_refused_handshake_is_a_flow_with_a_websocket_scheme(proxy: Proxy) -> None:
    async def deny(connection: ServerConnection, request: Any) -> Any:
        return connection.respond(403, "no\n")

    async with serve(echo, "127.0.0.1", 0, process_request=deny) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        with pytest.raises(websockets.InvalidStatus):
            await connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url)
    [flow] = flows(await proxy.until(lambda events: bool(flows(events))))
    assert (flow.request.scheme, flow.response.status, flow.response.body.data) == ("ws", 403, b"no\n")


async def test_websocket_enabled_false_records_no_message(tmp_path: Any) -> None:
    async with capture(tmp_path / "data", "--no-websocket-enabled") as proxy, echoing() as port:
        async with connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url) as client:
            await client.send("secret")
            await client.recv()
        assert await asyncio.to_thread(proxy.stop) == 0
        found = await proxy.events()
        assert len(flows(found)) == 1 and not messages(found)
