"""SIGTERM: what is in flight comes to its end, what is idle is closed at once, what does not end is interrupted."""

import asyncio
import signal
import socket
import threading
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from megido_capture.node.drain import SETTLED
from megido_capture.recording.state import ClientState
from megido_capture.stopping import DRAIN_SECONDS, Budget
from megido_shared.events import FlowCompleted, FlowInterrupted, FlowStarted, WebSocketMessage
from tests.integration.capture.harness import Proxy, body, capture, flows, read_events, until
from tests.integration.capture.test_limits import closed
from tests.integration.capture.test_slow_clients import secured
from tests.integration.capture.test_websocket import echoing
from tests.integration.capture.upstream import PIECE, Upstream, body_of_size, full_backlog
from tests.support.inside import Inside, inside

pytestmark = pytest.mark.timeout(120)

type Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(proxy: Proxy, upstream: Upstream, path: str) -> Streams:
    """A connection of its own, kept alive, on which this was requested."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    request(writer, upstream, path)
    return reader, writer


def request(writer: asyncio.StreamWriter, upstream: Upstream, path: str) -> None:
    writer.write(f"GET http://127.0.0.1:{upstream.port}/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


async def head(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)


async def seen(upstream: Upstream, path: bytes, count: int = 1) -> None:
    async def look() -> int:
        return sum(path in request for request in upstream.seen)

    await until(look, lambda found: found >= count)


async def refuses(proxy: Proxy) -> None:
    """Returns once nobody listens any more."""

    async def try_it() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", proxy.port)) != 0

    await until(try_it, bool)


async def test_what_is_in_flight_ends_and_what_is_idle_is_closed(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    async with capture(tmp_path / "data") as proxy, echoing() as port:
        silent = await connect(f"ws://localhost:{port}/silent", proxy=proxy.url, ping_interval=None)
        idle, slow = await ask(proxy, upstream, "plain/1"), await ask(proxy, upstream, "slow/2")
        stream, kept = await ask(proxy, upstream, "sse/3"), await ask(proxy, upstream, "plain/4")
        for reader, _ in (idle, kept):
            assert b" 200 " in await head(reader) and await reader.readuntil(b"}")
        assert b" 200 " in await head(stream[0]) and await stream[0].readuntil(b"data: 0\n\n")
        await seen(upstream, b"/slow/2")
        request(kept[1], upstream, "slow/5")  # its second on this connection
        await seen(upstream, b"/slow/5")

        proxy.process.send_signal(signal.SIGTERM)
        await refuses(proxy)
        assert await closed(idle[0])
        assert proxy.process.poll() is None
        upstream.release.set()
        for reader, what in ((slow[0], b"2"), (kept[0], b"5")):
            assert b"\r\nconnection: close\r\n" in (await head(reader)).lower()
            assert await asyncio.wait_for(reader.read(), 20) == b'{"answer": "' + what + b'"}', "all of it, and the end"
        assert (await asyncio.wait_for(stream[0].read(), 20)).endswith(b"data: 2\n\n\r\n0\r\n\r\n")
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(silent.recv(), 20)
        assert silent.close_code == 1001
        assert await asyncio.to_thread(proxy.process.wait, 20) == 0
        for _, writer in (idle, slow, stream, kept):
            writer.close()
    found = await read_events(proxy.data_dir)
    assert not flows(found, FlowInterrupted)
    assert sorted(flow.request.target for flow in flows(found) if flow.response.status == 200) == [
        *(b"/plain/1", b"/plain/4", b"/slow/2", b"/slow/5", b"/sse/3")
    ]
    [end] = [message for message in flows(found, WebSocketMessage) if message.message_type == "CLOSE"]
    assert (end.direction, end.close_code) == ("RECEIVE", 1001)


async def test_a_websocket_in_use_gets_its_time(tmp_path: Path, upstream: Upstream) -> None:
    async with (
        capture(tmp_path / "data") as proxy,
        echoing() as port,
        connect(f"ws://localhost:{port}/chat", proxy=proxy.url, ping_interval=None) as chat,
    ):
        idle = await ask(proxy, upstream, "plain/1")
        assert b" 200 " in await head(idle[0])
        await chat.send("before")
        assert await chat.recv() == "before"
        proxy.process.send_signal(signal.SIGTERM)
        gone = asyncio.create_task(refuses(proxy))
        count = 0
        while not gone.done() or count < 3:
            await chat.send(f"during {count}")
            assert await asyncio.wait_for(chat.recv(), 20) == f"during {count}"
            count += 1
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(chat.recv(), 20)
        assert chat.close_code == 1001
        assert await asyncio.to_thread(proxy.process.wait, 20) == 0
        idle[1].close()


async def test_who_is_interrupted_gets_no_answer_any_more(tmp_path: Path, upstream: Upstream) -> None:
    """One that comes between the end of the drain and the end of the process."""
    upstream.release.clear()
    async with inside(tmp_path / "data") as proxy:
        waiting, streaming = await ask(proxy, upstream, "slow/1"), await ask(proxy, upstream, "close/9000")
        await seen(upstream, b"/slow/1")
        assert b" 200 " in await head(streaming[0])
        await proxy.node.drain(Budget(0))
        upstream.release.set()
        assert await asyncio.wait_for(waiting[0].read(65536), 20) == b""
        assert len(await asyncio.wait_for(streaming[0].read(), 20)) < 9000
        found = await proxy.events()
        for _, writer in (waiting, streaming):
            writer.close()
    assert sorted(flow.request.target for flow in flows(found, FlowInterrupted)) == [b"/close/9000", b"/slow/1"]
    assert not [flow for flow in found if flow.seq and not isinstance(flow, FlowInterrupted)]


async def owed(proxy: Inside, upstream: Upstream, size: int) -> Streams:
    """A client that has an answer coming, of which its socket has taken next to nothing; the flow has ended."""
    with socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(("127.0.0.1", proxy.port))
        reader, writer = await asyncio.open_connection(sock=small.dup(), limit=4096)
    parts = proxy.node.parts

    async def clients() -> list[ClientState]:
        return list(parts.registry.clients.values())

    [client] = await until(clients, bool)
    transport = parts.handlers.transport(client.conn)
    assert transport is not None and isinstance(transport.writer, asyncio.StreamWriter)
    transport.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    request(writer, upstream, f"length/{size}")
    await proxy.until(lambda found: bool(flows(found)))
    assert parts.unsent.total() > size // 2
    return reader, writer


async def test_a_slow_reader_gets_all_of_an_answer_that_is_recorded(tmp_path: Path, upstream: Upstream) -> None:
    """The flow has ended with what the server sent; the stop waits for the client's part of it."""
    async with inside(tmp_path / "data") as proxy:
        reader, writer = await owed(proxy, upstream, 400_000)
        await proxy.node.end_connections()
        draining = asyncio.create_task(proxy.node.drain(Budget(600)))
        await asyncio.wait({draining}, timeout=4 * SETTLED)
        assert not draining.done(), "it was taken for idle"
        assert b" 200 " in await head(reader)
        assert await asyncio.wait_for(reader.readexactly(400_000), 30) == body_of_size(400_000)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        await asyncio.wait_for(draining, 30)
        assert not proxy.node.parts.counters["answers_cut_by_stop"]
        writer.close()


async def test_a_slow_reader_over_http2_gets_all_of_it(tmp_path: Path, upstream_tls: Upstream, trusted: str) -> None:
    """It waits for the client's window, not in its socket."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    fields = [(":method", "GET"), (":path", "/length/40000"), (":scheme", "https"), (":authority", "localhost")]
    client.send_headers(1, fields, end_stream=True)
    async with inside(tmp_path / "data", ssl_verify_upstream_trusted_ca=trusted) as proxy:
        reader, writer = await secured(proxy, upstream_tls.port, "h2")
        writer.write(client.data_to_send())
        await proxy.until(lambda found: bool(flows(found)))
        await proxy.node.end_connections()
        draining = asyncio.create_task(proxy.node.drain(Budget(600)))
        await asyncio.wait({draining}, timeout=4 * SETTLED)
        assert not draining.done(), "it was taken for idle"
        received = b""
        while len(received) < 40_000:
            for event in client.receive_data(await asyncio.wait_for(reader.read(65536), 20)):
                if isinstance(event, h2.events.DataReceived):
                    received += event.data
                    client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            writer.write(client.data_to_send())
        assert received == body_of_size(40_000)
        await asyncio.wait_for(draining, 30)
        writer.close()


async def test_who_is_owed_something_when_time_is_up_is_told_by_a_reset(tmp_path: Path, upstream: Upstream) -> None:
    """An end would make half of an answer without a length look whole. That the flow is complete is right: all that
    the server sent is known."""
    async with inside(tmp_path / "data") as proxy:
        reader, writer = await owed(proxy, upstream, 400_000)
        await proxy.node.end_connections()
        await proxy.node.drain(Budget(0))
        with pytest.raises(ConnectionError):
            while await asyncio.wait_for(reader.read(65536), 20):
                pass
        assert proxy.node.parts.counters["answers_cut_by_stop"] == 1
        found = await proxy.events()
        writer.close()
    [flow] = [event for event in found if event.seq]
    assert isinstance(flow, FlowCompleted) and body(found, flow) == body_of_size(400_000)


async def test_a_stop_does_not_wait_for_a_long_recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start tells what this one did not come to."""
    monkeypatch.setattr("megido_capture.node.ending.RECOVERY", 0.1)
    go_on = threading.Event()
    async with inside(tmp_path / "data") as proxy:
        proxy.node.retelling.thread = reading = threading.Thread(target=go_on.wait)
        reading.start()
        try:
            await asyncio.wait_for(proxy.node.drain(Budget(600)), 30)
            assert reading.is_alive()
        finally:
            go_on.set()
            reading.join()


@pytest.mark.parametrize("path", [(), ("--no-fastpath",)])
async def test_the_end_of_the_process_is_no_answer(tmp_path: Path, path: tuple[str, ...]) -> None:
    """Of a client whose upstream is being connected to."""
    async with capture(tmp_path / "data", *path) as proxy:
        with full_backlog() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % port)
            await proxy.until(lambda found: bool(flows(found, FlowStarted)))
            proxy.process.send_signal(signal.SIGTERM)
            await refuses(proxy)
            proxy.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            assert await asyncio.to_thread(proxy.process.wait, 20) == 0
            writer.close()
    [_, end] = await proxy.events()
    assert isinstance(end, FlowInterrupted)


async def test_what_does_not_end_is_interrupted_with_kafka_down_too(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        kafka = ("--kafka", f"127.0.0.1:{nobody.getsockname()[1]}", "--forwarder")
        ignore = ("--set", f"ignore_hosts=localhost:{upstream.port}")
        async with capture(tmp_path / "data", *kafka, *ignore) as proxy:
            endless = [await ask(proxy, upstream, f"close/9000?{number}") for number in range(6)]
            for reader, _ in endless:
                await head(reader)
                assert await asyncio.wait_for(reader.readexactly(len(PIECE)), 20) == PIECE
            tunnel = await asyncio.open_connection("127.0.0.1", proxy.port)
            tunnel[1].write(b"CONNECT localhost:%d HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
            assert b" 200 " in await head(tunnel[0])
            tunnel[1].write(b"GET /plain/before HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.wait_for(tunnel[0].readuntil(b'"before"}'), 20)
            idle = await ask(proxy, upstream, "plain/idle")
            assert await asyncio.wait_for(idle[0].readuntil(b'"idle"}'), 20)
            proxy.process.send_signal(signal.SIGTERM)
            await refuses(proxy)
            assert await closed(idle[0])
            tunnel[1].write(b"GET /plain/during HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.wait_for(tunnel[0].readuntil(b'"during"}'), 20)
            # Within 15 s; a machine that is busy otherwise takes longer. Left to themselves these never end.
            assert await asyncio.to_thread(proxy.process.wait, 30) == 0
            for _, writer in (*endless, tunnel, idle):
                writer.close()
    found = await read_events(proxy.data_dir)
    cut = flows(found, FlowInterrupted)
    assert sorted(flow.request.target for flow in cut) == [b"/close/9000?%d" % number for number in range(6)]
    assert all(body(found, flow) == PIECE for flow in cut)
    assert [flow.request.target for flow in flows(found)] == [b"/plain/idle"]


async def test_a_second_signal_ends_the_wait(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    async with capture(tmp_path / "data", "--workers", "2") as proxy:
        streams = [await ask(proxy, upstream, f"close/9000?{number}") for number in range(4)]
        for reader, _ in streams:
            await head(reader)
        proxy.process.send_signal(signal.SIGINT)
        await refuses(proxy)
        proxy.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(proxy.process.wait, DRAIN_SECONDS - 3) == 0, "before its time"
        for _, writer in streams:
            writer.close()
    assert len(flows(await read_events(proxy.data_dir), FlowInterrupted)) == 4
