"""Clients that hold a place and bring nothing: inside tunnels, over HTTP/2, with bodies, ahead of an answer."""

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import h2.config
import h2.connection
import pytest
import trustme
from hyperframe.frame import HeadersFrame

from megido_shared.events import ErrorRaised, ErrorType, FlowFailed
from tests.integration.capture.harness import Proxy, capture, curl, flows, until
from tests.integration.capture.test_limits import busy, closed, connected, counted, get, url
from tests.integration.capture.upstream import Upstream, full_backlog
from tests.support.raw_server import RawServer, Talk

pytestmark = pytest.mark.timeout(120)

type Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""The first bytes of a TLS handshake."""


async def tunnel(proxy: Proxy, port: int, host: str = "127.0.0.1") -> Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def secured(proxy: Proxy, port: int, alpn: str) -> Streams:
    streams = await tunnel(proxy, port, "localhost")
    context = ssl.create_default_context(cafile=str(proxy.ca))
    context.set_alpn_protocols([alpn])
    await streams[1].start_tls(context, server_hostname="localhost")
    return streams


def preface() -> bytes:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    return client.data_to_send()


def unfinished_headers() -> bytes:
    frame = HeadersFrame(1, data=b"\x82\x87")  # no END_HEADERS: CONTINUATION must follow
    return frame.serialize()


@pytest.fixture
async def slow_proxy(tmp_path: Path, trusted: str) -> AsyncIterator[Proxy]:
    options = ("--header-timeout", "1", "--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    async with capture(tmp_path, *options) as proxy:
        yield proxy


async def test_a_tunnel_has_the_deadline_of_heads(
    slow_proxy: Proxy, upstream: Upstream, upstream_tls: Upstream
) -> None:
    port = upstream_tls.port
    silent, half = await tunnel(slow_proxy, port), await tunnel(slow_proxy, port)
    half[1].write(HELLO)
    started, partial = await secured(slow_proxy, port, "http/1.1"), await secured(slow_proxy, port, "http/1.1")
    partial[1].write(b"GET / HTTP/1.1\r\nX: ")
    nothing, cut, headers = [await secured(slow_proxy, port, "h2") for _ in range(3)]
    nothing[1].write(preface())
    cut[1].write(preface() + struct.pack(">BHBBI", 0, 100, 1, 4, 1) + b"\x82")
    headers[1].write(preface() + unfinished_headers())
    for name, streams in locals().copy().items():
        if isinstance(streams, tuple):
            assert await _ends(streams[0]), name
    assert (await curl(slow_proxy, url(upstream))).status == 200
    assert await counted(slow_proxy, "header_timeouts") >= 7


async def test_an_http2_connection_that_has_served_has_it_again(slow_proxy: Proxy, upstream_tls: Upstream) -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    fields = [(":method", "GET"), (":path", "/plain/1"), (":scheme", "https"), (":authority", "localhost")]
    client.send_headers(1, fields, end_stream=True)
    idle, unfinished = [await secured(slow_proxy, upstream_tls.port, "h2") for _ in range(2)]
    said = client.data_to_send()
    for reader, writer in (idle, unfinished):
        writer.write(said)
        seen = b""
        while b"h2 /plain/1" not in seen:
            seen += await asyncio.wait_for(reader.read(65536), 20)
    frame = HeadersFrame(3, data=b"\x82\x87")
    unfinished[1].write(frame.serialize())
    assert await _ends(unfinished[0])
    idle[1].write(client.data_to_send() or b"")
    with pytest.raises(TimeoutError):
        while await asyncio.wait_for(idle[0].read(65536), 0.5):
            pass


async def test_the_open_requests_of_a_client_that_is_cut_say_why(tmp_path: Path, trusted: str) -> None:
    """The head of one HTTP/2 request stops; another request waits for its answer."""
    asked = asyncio.Event()

    async def hang(talk: Talk) -> None:
        await talk.head()
        asked.set()
        await talk.rest()

    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    async with RawServer(hang) as server, capture(tmp_path, "--header-timeout", "1") as proxy:
        fields = [(":method", "GET"), (":path", "/"), (":scheme", "http"), (":authority", f"127.0.0.1:{server.port}")]
        client.send_headers(1, fields, end_stream=True)
        context = ssl.create_default_context(cafile=str(proxy.ca))
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        await writer.start_tls(context)
        writer.write(client.data_to_send())
        await asyncio.wait_for(asked.wait(), 20)
        writer.write(HeadersFrame(3, data=b"\x82\x87").serialize())
        assert await _ends(reader)
        found = await proxy.until(lambda events: bool(flows(events, FlowFailed)))
    [event] = flows(found, FlowFailed)
    assert event.failure.error_type is ErrorType.TIMEOUT and "header_timeout" in event.failure.message


@pytest.mark.parametrize(
    ("first", "why"),
    [(b"GET / HTTP/1.1\r\nX: ", "finish the head of its request"), (HELLO, "finish its TLS handshake")],
)
async def test_behind_a_server_with_tls_a_client_is_told_by_its_own(
    tmp_path: Path, upstream_tls: Upstream, trusted: str, first: bytes, why: str
) -> None:
    options = ("--header-timeout", "1", "--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    mode = ("--mode", f"reverse:https://localhost:{upstream_tls.port}")
    async with capture(tmp_path, *options, *mode) as proxy, connected(proxy, 1, first) as [(reader, _)]:
        assert await closed(reader)
        found = await proxy.until(lambda events: bool(flows(events, ErrorRaised)))
    [event] = flows(found, ErrorRaised)
    assert why in event.failure.message


def socks_to(port: int) -> bytes:
    return b"\5\1\0" + b"\5\1\0\1\x7f\0\0\1" + port.to_bytes(2)


async def test_the_first_step_over_socks_has_it(tmp_path: Path, upstream: Upstream) -> None:
    """It stands still while the server is connected to."""

    async def greet(talk: Talk) -> None:
        await talk.say(b"220 ready")
        await talk.rest()

    options = ("--header-timeout", "1", "--connection-timeout", "3", "--mode", "socks5")
    async with (
        RawServer(greet) as greeting,
        contextlib.AsyncExitStack() as stack,
        capture(tmp_path, *options) as proxy,
        connected(proxy, 1, socks_to(greeting.port)) as [(greeted, _)],
        connected(proxy, 1, socks_to(stack.enter_context(full_backlog()))) as [(waiting, _)],
        connected(proxy, 1) as [(silent, _)],
        connected(proxy, 1, b"\5\1\0") as [(half, _)],
        connected(proxy, 1, socks_to(upstream.port)) as [(tunnelled, _)],
    ):
        for reader in (silent, half, tunnelled):
            assert await _ends(reader)
        assert await counted(proxy, "header_timeouts") == 3
        assert (await asyncio.wait_for(waiting.readexactly(12), 20))[2:4] == b"\5\4", "could not connect"
        assert (await asyncio.wait_for(greeted.readexactly(21), 20)).endswith(b"220 ready")
        assert not await closed(greeted, 0.1)


@pytest.mark.parametrize(("scheme", "ended"), [("http", True), ("https", True), ("tcp", False)])
async def test_the_first_step_to_a_reverse_proxy_has_it_where_clients_speak_first(
    tmp_path: Path, upstream: Upstream, upstream_tls: Upstream, trusted: str, scheme: str, ended: bool
) -> None:
    port = upstream_tls.port if scheme == "https" else upstream.port
    options = ("--header-timeout", "1", "--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    mode = ("--mode", f"reverse:{scheme}://localhost:{port}")
    async with capture(tmp_path, *options, *mode) as proxy, connected(proxy, 1) as [(reader, _)]:
        assert await closed(reader, 20 if ended else 3) == ended


async def test_what_is_no_http_has_none(tmp_path: Path, authority: trustme.CA) -> None:
    """A raw tunnel, and one whose TLS is not ours to open."""

    async def echo(talk: Talk) -> None:
        while True:
            await talk.say(await talk.some())

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    options = ("--header-timeout", "1", "--set", "passthrough_hosts=localhost")
    async with (
        RawServer(echo) as plain,
        RawServer(echo, tls=context) as pinned,
        capture(tmp_path, *options) as proxy,
    ):
        raw = await tunnel(proxy, plain.port)
        through = await tunnel(proxy, pinned.port, "localhost")
        await through[1].start_tls(trusting, server_hostname="localhost")
        waiting = await tunnel(proxy, plain.port)  # says when the deadline is over
        for _, writer in (raw, through):
            writer.write(b"\x00\x01 first")
        assert await _ends(waiting[0])
        for reader, writer in (raw, through):
            writer.write(b"\x00\x02 second")
            seen = b""
            while b"second" not in seen:
                seen += await asyncio.wait_for(reader.read(65536), 20)


@pytest.mark.parametrize("length", ["Content-Length: 400", "Content-Length: 400\r\nExpect: 100-continue"])
async def test_a_body_that_never_comes(slow_proxy: Proxy, upstream: Upstream, length: str) -> None:
    post = f"POST {url(upstream, 'count')} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\nx".encode()
    async with connected(slow_proxy, 1, post) as [(reader, writer)]:

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b"x")
                    await asyncio.sleep(0.1)

        trickling = asyncio.create_task(trickle())
        assert await _ends(reader)
        trickling.cancel()
    found = await slow_proxy.until(lambda events: bool(flows(events, FlowFailed)))
    [event] = flows(found, FlowFailed)
    assert event.failure.error_type is ErrorType.TIMEOUT and "body" in event.failure.message
    assert upstream.seen == [] and await counted(slow_proxy, "body_timeouts") == 1


async def test_a_body_that_streams_may_be_slow(slow_proxy: Proxy, upstream: Upstream) -> None:
    head = f"POST {url(upstream, 'count')} HTTP/1.1\r\nHost: x\r\n"
    streaming = f"{head}Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n".encode()
    whole = f"{head}Content-Length: 9\r\n\r\nx".encode()
    async with (
        connected(slow_proxy, 1, streaming) as [(reader, writer)],
        connected(slow_proxy, 1, whole) as [(slow, _)],
    ):
        assert await _ends(slow)
        writer.write(b"0\r\n\r\n")
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")


async def test_requests_ahead_of_an_answer_are_bounded(slow_proxy: Proxy, upstream: Upstream) -> None:
    upstream.release.clear()
    async with connected(slow_proxy, 1, get(upstream, "hang")) as [(reader, writer)]:
        await busy(upstream, 1)
        writer.write(f"POST {url(upstream)} HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                writer.write(bytes(65536))
                await writer.drain()
        assert await closed(reader)
    found = await slow_proxy.until(lambda events: bool(flows(events, FlowFailed)))
    [event] = flows(found, FlowFailed)
    assert event.failure.error_type is ErrorType.PROTOCOL_ERROR and "ahead" in event.failure.message
    upstream.release.set()


async def test_a_client_that_only_makes_noise_gives_way(tmp_path: Path, upstream: Upstream) -> None:
    async with (
        capture(tmp_path, "--max-concurrent-clients", "2", "--header-timeout", "2") as proxy,
        connected(proxy, 2, get(upstream, "plain/1")) as noisy,
    ):

        async def noise(writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b"\r\n")
                    await asyncio.sleep(0.2)

        for reader, _ in noisy:
            await reader.readuntil(b"}")
        making = [asyncio.create_task(noise(writer)) for _, writer in noisy]
        await until(lambda: curl(proxy, url(upstream)), lambda answer: answer.status == 200)
        assert await counted(proxy, "evicted_clients") == 1
        for task in making:
            task.cancel()


async def test_two_thousand_idle_connections_and_slow_heads(tmp_path: Path, upstream: Upstream) -> None:
    """The default caps. Half of them have begun a head that never ends."""
    async with capture(tmp_path) as proxy:
        assert (await curl(proxy, url(upstream))).status == 200
        async with connected(proxy, 1100), connected(proxy, 1100, get(upstream, "never")[:-2] + b"X-Slow: "):
            await until(lambda: counted(proxy, "evicted_clients"), lambda found: found >= 200)
            answers = [(await curl(proxy, url(upstream, f"plain/{number}"))).status for number in range(20)]
            assert answers == [200] * 20


async def _ends(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends, whatever is said on it first."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        async with asyncio.timeout(20):
            while await reader.read(65536):
                pass
    return True
