"""A running proxy whose user turns recording off and on, or injects messages."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
from mitmproxy import http
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from megido_capture.addon import MegidoAddon
from megido_capture.master import CaptureMaster
from megido_shared.events import WebSocketMessage
from tests.integration.capture.harness import Proxy, flows, read_events
from tests.integration.capture.upstream import Upstream


class Seen:
    """Another addon of the user's."""

    name = "seen"
    flow: http.HTTPFlow

    def websocket_start(self, flow: http.HTTPFlow) -> None:
        self.flow = flow


@contextlib.asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[tuple[CaptureMaster, str, Seen]]:
    """The proxy in this process, so that its options and commands are at hand."""
    addon, seen = MegidoAddon({"MEGIDO_DATA_DIR": str(data_dir)}, hosted=False), Seen()
    master = CaptureMaster(addon, ["regular"], fast=False)
    master.options.update(listen_host="127.0.0.1", listen_port=0, megido_forwarder=False)
    master.capture.begin()
    master.addons.add(seen)
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.ensure_future(master.serve(stop, ready.set))
    await asyncio.wait_for(ready.wait(), 20)
    assert addon.node is not None
    try:
        yield master, f"http://{addon.node.listening()}", seen
    finally:
        stop.set()
        await serving


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def test_switched_off_and_on_while_a_connection_is_open(tmp_path: Path) -> None:
    async with running(tmp_path) as (master, url, _), serve(echo, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}/", proxy=url, ping_interval=None) as client:
            for text, recorded in (("one", True), ("secret", False), ("two", True)):
                master.options.update(websocket_enabled=recorded)
                await client.send(text)
                assert await client.recv() == text
                await (await client.ping(text.encode()))
    found = flows(await read_events(tmp_path), WebSocketMessage)
    assert [(m.sequence, m.message_type, m.payload) for m in found] == [
        (0, "TEXT", b"one"),
        (1, "TEXT", b"one"),
        (2, "PING", b"one"),
        (3, "PONG", b"one"),
        (8, "TEXT", b"two"),
        (9, "TEXT", b"two"),
        (10, "PING", b"two"),
        (11, "PONG", b"two"),
        (12, "CLOSE", b""),
    ]


async def test_injected_messages_are_recorded(tmp_path: Path) -> None:
    got: asyncio.Queue[Any] = asyncio.Queue()

    async def listen(connection: ServerConnection) -> None:
        async for message in connection:
            await got.put(message)

    async with running(tmp_path) as (master, url, seen), serve(listen, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with connect(f"ws://127.0.0.1:{port}/", proxy=url, ping_interval=None) as client:
            await client.send("mine")
            assert await asyncio.wait_for(got.get(), 20) == "mine"
            master.commands.call("inject.websocket", seen.flow, True, b"to the client")
            assert await asyncio.wait_for(client.recv(), 20) == "to the client"
            master.commands.call("inject.websocket", seen.flow, False, b"\x00\xff" * 5000, False)
            assert await asyncio.wait_for(got.get(), 20) == b"\x00\xff" * 5000
    found = flows(await read_events(tmp_path), WebSocketMessage)
    assert [(m.direction, m.message_type, m.payload) for m in found] == [
        ("SEND", "TEXT", b"mine"),
        ("RECEIVE", "TEXT", b"to the client"),
        ("SEND", "BINARY", b"\x00\xff" * 5000),
        ("SEND", "CLOSE", b""),
    ]


async def test_no_websocket_over_http2_is_offered(proxy: Proxy, upstream_tls: Upstream) -> None:
    """mitmproxy relays none (RFC 8441): clients must be told, and then use HTTP/1.1, where it is recorded."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(f"CONNECT localhost:{upstream_tls.port} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    tls = ssl.create_default_context(cafile=str(proxy.ca))
    tls.set_alpn_protocols(["h2"])
    await writer.start_tls(tls, server_hostname="localhost")
    found = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    found.initiate_connection()
    writer.write(found.data_to_send())
    changed: dict[Any, Any] = {}
    while not changed:
        data = await asyncio.wait_for(reader.read(65536), 20)
        assert data
        for event in found.receive_data(data):
            if isinstance(event, h2.events.RemoteSettingsChanged):
                changed |= event.changed_settings
    assert not found.remote_settings.enable_connect_protocol
    writer.close()
