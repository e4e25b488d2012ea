"""The replacements of mitmproxy's hot spots change nothing that a client, a server or the journal could see."""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megido_shared.events import unpack_headers
from tests.integration.capture import harness
from tests.integration.capture.harness import Proxy, capture, curl, flows
from tests.integration.capture.upstream import Upstream
from tests.support.raw_server import OK, RawServer, Talk

MB = 1 << 20

PLAIN = (
    ("/plain/a?b=%20c", ()),
    ("/plain/head", ("--head",)),
    ("/echo", ("-d", "k=v", "-H", "X-Case: Kept", "-H", "x-case: twice")),
    ("/echo", ("-X", "PUT", "-d", "k=v", "-H", "Transfer-Encoding: chunked")),
    ("/count", ("-d", "k=v", "-H", "Expect: 100-continue")),
    ("/chunked/9000", ()),
    ("/chunked/700001", ()),
    ("/length/700001", ()),
    ("/close/5000", ()),
    ("/sse/3", ()),
    ("/resethead", ()),
    ("/resetbody", ()),
    ("/garbage", ()),
)
SECURE = (
    ("/plain/a?b=%20c", ("--http1.1",)),
    ("/echo", ("--http1.1", "-d", "k=v")),
    ("/length/700001", ("--http1.1",)),
    ("/plain/h2", ("--http2",)),
    ("/count", ("--http2", "-d", "k=v")),
    ("/length/700001", ("--http2",)),
    ("/nolength/x", ("--http2",)),
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[tuple[Proxy, Proxy]]:
    """With the fast path, and without."""
    options = ("--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    with_it = harness.start(tmp_path_factory.mktemp("fast"), *options)
    without = harness.start(tmp_path_factory.mktemp("plain"), *options, "--no-fastpath")
    yield with_it, without
    assert (with_it.stop(), without.stop()) == (0, 0)


@pytest.fixture(params=["fastpath", "no-fastpath"])
def either(request: pytest.FixtureRequest, both: tuple[Proxy, Proxy]) -> Proxy:
    return both[0 if request.param == "fastpath" else 1].from_now()


async def _seen(proxy: Proxy, base: str, exchanges: tuple[tuple[str, tuple[str, ...]], ...]) -> list[Any]:
    """What the clients got, and what was recorded, without what differs each time."""
    proxy = proxy.from_now()
    answers = [await curl(proxy, base + path, *arguments) for path, arguments in exchanges]
    found = await proxy.until(lambda events: len([e for e in events if hasattr(e, "timing") and e.seq]) == len(answers))
    ended = sorted((e for e in found if hasattr(e, "timing") and e.seq), key=lambda e: e.seq)
    return [
        *answers,
        *((type(e), _without_data(e.request), _without_data(e.response), getattr(e, "failure", None)) for e in ended),
    ]


def _without_data(message: Any) -> Any:
    if message is None:
        return None
    body = message.body
    headers = [pair for pair in unpack_headers(message.headers) if pair[0].lower() != b"date"]
    return [getattr(message, name, None) for name in ("method", "target", "status", "reason", "http_version")], [
        headers,
        (body.size, body.sha256, body.truncated, bytes(body.data)),
    ]


async def test_the_same_is_answered_and_recorded(both: tuple[Proxy, Proxy], upstream: Upstream) -> None:
    base = f"http://127.0.0.1:{upstream.port}"
    fast, plain = [await _seen(proxy, base, PLAIN) for proxy in both]
    assert fast == plain and len(fast) == 2 * len(PLAIN)


async def test_the_same_over_tls(both: tuple[Proxy, Proxy], upstream_tls: Upstream) -> None:
    base = f"https://localhost:{upstream_tls.port}"
    fast, plain = [await _seen(proxy, base, SECURE) for proxy in both]
    assert fast == plain and all(answer.status == 200 for answer in fast[: len(SECURE)])


async def test_requests_that_come_together_are_answered_in_order(either: Proxy, upstream: Upstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", either.port)
    heads = [b"GET http://127.0.0.1:%d/plain/%d HTTP/1.1\r\nHost: x\r\n\r\n" % (upstream.port, n) for n in range(20)]
    writer.write(b"".join(heads))
    for number in range(20):
        await asyncio.wait_for(reader.readuntil(b'{"answer": "%d"}' % number), 20)
    writer.close()
    found = await either.until(lambda events: len(flows(events)) == 20)
    assert [flow.request.target for flow in flows(found)] == [b"/plain/%d" % number for number in range(20)]


async def test_a_client_that_reads_slowly_holds_the_server_up(either: Proxy) -> None:
    total = 48 * MB
    sent = 0

    async def script(talk: Talk) -> None:
        nonlocal sent
        await talk.head()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            talk.writer.write(bytes(MB))
            await talk.writer.drain()
            sent += MB

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", either.port)
        writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % server.port)
        await _stands_still(lambda: sent)
        assert sent < total // 2  # the rest is in the sockets' buffers
        received = len(await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30))
        while received < total and (piece := await asyncio.wait_for(reader.read(MB), 30)):
            received += len(piece)
        writer.close()
    assert received >= total and sent == total


async def test_a_server_that_reads_slowly_holds_the_client_up(either: Proxy) -> None:
    total = 48 * MB
    go_on = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.head()
        talk.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await go_on.wait()
        talk.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(48):
            await talk.exactly(MB)
            talk.received.clear()
        await talk.say(OK)

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", either.port)
        head = b"POST http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (server.port, total))
        sent = 0

        async def upload() -> None:
            nonlocal sent
            while sent < total:
                writer.write(bytes(MB))
                await writer.drain()
                sent += MB

        uploading = asyncio.create_task(upload())
        await _stands_still(lambda: sent)
        assert sent < total // 2
        go_on.set()
        assert (await asyncio.wait_for(reader.readuntil(b"ok"), 60)).startswith(b"HTTP/1.1 200")
        await uploading
        writer.close()


async def test_a_tunnel_is_closed_from_one_side(either: Proxy) -> None:
    whole = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.exactly(100_000)
        whole.set()
        await talk.rest()

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", either.port)
        writer.write(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % server.port)
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        writer.write(b"\x00" * 100_000)  # no protocol that is known
        await asyncio.wait_for(whole.wait(), 20)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 20) == b""  # mitmproxy closes both ways
        writer.close()


async def test_a_client_that_leaves_closes_its_upstream(either: Proxy) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.head()
        asked.set()
        await talk.rest()
        left.set()

    async with RawServer(script) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", either.port)
        writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % server.port)
        await writer.drain()
        async with asyncio.timeout(20):
            await asked.wait()
        writer.transport.abort()
        await asyncio.wait_for(left.wait(), 20)
    found = await either.until(lambda events: any(getattr(e, "failure", None) for e in events))
    assert len([e for e in found if e.seq]) == 1


@pytest.mark.parametrize("mode", ["reverse", "socks5", "upstream"])
async def test_other_modes(tmp_path: Any, both: tuple[Proxy, Proxy], upstream: Upstream, mode: str) -> None:
    target = f"http://127.0.0.1:{upstream.port}"
    given = {"reverse": f"reverse:{target}", "socks5": "socks5", "upstream": f"upstream:{both[1].url}"}[mode]
    async with capture(tmp_path, "--mode", given) as proxy:
        how = {"reverse": ["--noproxy", "*"], "socks5": ["-x", f"socks5h://127.0.0.1:{proxy.port}"], "upstream": []}[
            mode
        ]
        answer = await curl(proxy, f"{proxy.url if mode == 'reverse' else target}/plain/x", *how)
        assert (answer.status, answer.body) == (200, b'{"answer": "x"}')
        [flow] = flows(await proxy.until(lambda events: bool(flows(events))))
        assert flow.request.target == b"/plain/x" and flow.response.status == 200


@pytest.mark.parametrize("fast", ["--fastpath", "--no-fastpath"])
async def test_half_of_a_raw_connection_is_closed(tmp_path: Any, fast: str) -> None:
    async def script(talk: Talk) -> None:
        got = await talk.rest()
        await talk.say(b"got %d" % len(got))

    async with (
        RawServer(script) as server,
        capture(tmp_path, "--mode", f"reverse:tcp://127.0.0.1:{server.port}", fast) as proxy,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(bytes(100_000))
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 20) == b"got 100000"
        writer.close()


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("fast", ["--fastpath", "--no-fastpath"])
async def test_a_reset_client_of_a_raw_connection_ends_its_upstream(
    tmp_path: Any, fast: str, half_closed: bool
) -> None:
    ended = asyncio.Event()

    async def script(talk: Talk) -> None:
        try:
            while True:
                await talk.say(bytes(1000))
                await asyncio.sleep(0)  # lets the other side of the test run
        except OSError:
            ended.set()

    async with (
        RawServer(script) as server,
        capture(tmp_path, "--mode", f"reverse:tcp://127.0.0.1:{server.port}", fast) as proxy,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        await asyncio.wait_for(reader.read(1), 20)
        if half_closed:
            writer.write_eof()
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 20)


async def _stands_still(read: Callable[[], int]) -> None:
    """Until a count has not moved for a while: what is written then fills the buffers on the way."""

    async def seen() -> int:
        return read()

    last: list[int] = []

    def still(count: int) -> bool:
        last.append(count)
        return count > 0 and last[-20:] == [count] * 20

    await harness.until(seen, still)
