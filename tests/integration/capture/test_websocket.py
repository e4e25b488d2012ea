"""WebSocket conversations, frame by frame, over WS and WSS."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trustme
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from megido_shared import events
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import WEBSOCKET
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


def closed(found: list[Any]) -> bool:
    return any(m.message_type == "CLOSE" for m in messages(found))


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
    found = await proxy.until(closed)
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
    found = await proxy.until(closed)
    assert [m.size for m in messages(found)] == [10_000, 10_000, 0]


async def test_connection_that_is_cut(proxy: Proxy) -> None:
    async with echoing() as port:
        client = await connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url)
        await client.send("last words")
        await client.recv()
        client.transport.abort()
        found = await proxy.until(closed)  # the server's own end comes later
    assert (messages(found)[-1].close_code, messages(found)[-1].direction) == (1006, "SEND")


async def test_a_message_is_stored_whole_up_to_max_body_size(tmp_path: Path) -> None:
    async with capture(tmp_path, "--websocket-max-message", "2000000") as proxy:
        await send(proxy, LARGE)
        found = await proxy.until(closed)
    check_large([m for m in messages(found) if m.message_type == "BINARY"])


@pytest.mark.kafka
async def test_a_message_as_large_as_max_body_size_travels_through_kafka(tmp_path: Path, kafka: str) -> None:
    name = f"ws-{uuid4().hex}"
    found: list[WebSocketMessage] = []
    options = ("--kafka", kafka, "--forwarder", "--node-name", name, "--websocket-max-message", "2000000")
    async with capture(tmp_path, *options) as proxy:
        await send(proxy, LARGE)
        bus = KafkaBus(kafka)
        async with asyncio.timeout(60):
            while WEBSOCKET.name not in await bus.topics():
                await asyncio.sleep(0.1)
            consumer = await bus.consumer(name, [WEBSOCKET])
            while not any(message.message_type == "CLOSE" for message in found):
                records = (await consumer.poll()).records
                found += [e for e in (events.decode(record.value) for record in records) if e.node == f"{name}-0"]
        await consumer.close()
        await bus.close()
    check_large([message for message in found if message.message_type == "BINARY"])


LARGE = [os.urandom(1 << 20), os.urandom((1 << 20) + 1)]
"""Exactly `max_body_size`, and one byte more. Random: nothing on the way makes them smaller."""


async def send(proxy: Proxy, payloads: list[bytes]) -> None:
    """Sends each message and has it back."""
    async with echoing() as port, connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url, max_size=None) as client:
        for payload in payloads:
            await client.send(payload)
            assert await client.recv() == payload


def check_large(stored: list[WebSocketMessage]) -> None:
    whole, cut = LARGE
    expected = [(whole, len(whole), False)] * 2 + [(cut[:-1], len(cut), True)] * 2
    assert [(m.payload, m.size, m.truncated) for m in stored] == expected


CAP = 1 << 20


async def sends(connection: ClientConnection | ServerConnection, message: str) -> None:
    """What `message` names, of zeros."""
    how, _, size = message.partition(" ")
    if how == "fragments":
        await connection.send([bytes(1000)] * (int(size) // 1000))
    elif how == "pieces":
        await connection.send([b""] * int(size))
    else:
        await connection.send(bytes(int(size)))


@contextlib.asynccontextmanager
async def obeying(codes: asyncio.Queue[int | None], compression: str | None) -> AsyncIterator[int]:
    """A server that sends what it is told to, and enters the code that each connection ended with."""

    async def handle(connection: ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in connection:
                if isinstance(message, str):
                    await sends(connection, message)
        await connection.wait_closed()
        await codes.put(connection.close_code)

    async with serve(handle, "127.0.0.1", 0, max_size=None, compression=compression) as server:
        yield next(iter(server.sockets)).getsockname()[1]


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize(
    "message", [f"whole {CAP + 1}", "whole 8000000", f"fragments {CAP + 1000}", "pieces 70000", f"deflated {CAP + 1}"]
)
async def test_a_message_over_the_cap_ends_the_connection_with_1009(proxy: Proxy, sender: str, message: str) -> None:
    codes: asyncio.Queue[int | None] = asyncio.Queue()
    compression = "deflate" if message.startswith("deflated") else None
    async with obeying(codes, compression) as port:
        url = f"ws://127.0.0.1:{port}/"
        client = await connect(url, proxy=proxy.url, max_size=None, compression=compression)
        await client.send(f"whole {CAP}")
        assert await client.recv() == bytes(CAP), "as much as the cap passes"
        with contextlib.suppress(websockets.ConnectionClosed):
            await (sends(client, message) if sender == "client" else client.send(message))
        await asyncio.wait_for(client.wait_closed(), 10)
        assert (client.close_code, await asyncio.wait_for(codes.get(), 10)) == (1009, 1009)
    found = messages(await proxy.until(closed))
    last = found[-1]
    assert (last.message_type, last.close_code) == ("CLOSE", 1009)
    assert last.direction == ("SEND" if sender == "client" else "RECEIVE")
    assert [m.size for m in found if m.message_type == "BINARY"] == [CAP], "what was refused is not recorded"


@pytest.mark.parametrize("sender", ["client", "server"])
async def test_a_deflate_bomb_takes_no_memory(tmp_path: Path, sender: str) -> None:
    codes: asyncio.Queue[int | None] = asyncio.Queue()
    async with capture(tmp_path) as proxy, obeying(codes, "deflate") as port:
        before = peak_kb(proxy)
        async with connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url, max_size=None) as client:
            message = f"deflated {64 << 20}"
            await (sends(client, message) if sender == "client" else client.send(message))
            await asyncio.wait_for(client.wait_closed(), 10)
        assert (client.close_code, await asyncio.wait_for(codes.get(), 10)) == (1009, 1009)
        assert peak_kb(proxy) - before < 48 << 10


def peak_kb(proxy: Proxy) -> int:
    """The most memory that the process ever held."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


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
