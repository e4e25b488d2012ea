"""Bodies that are larger than anybody wants to hold, each way: the same bytes arrive, the first are stored, the rest
is counted and hashed, and the proxy's memory stays flat, also when the reader is slow.

MEGIDO_BODY_MB (48) sets their size; `make faults` takes 1,024.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.integration.capture import h2peer
from tests.integration.capture.conftest import server_context
from tests.integration.capture.h2peer import H2Peer, patiently
from tests.integration.capture.harness import Proxy, body, curl, flows, start

SIZE = int(os.environ.get("MEGIDO_BODY_MB", "48")) << 20
CAP = 1 << 20
PIECE = 1 << 16
KERNEL = 1 << 18
"""Bytes that the kernel may hold at our ends: it would take tens of megabytes."""
GROWTH = 32 << 20
"""Bytes by which the proxy may grow."""


def pieces(size: int = SIZE) -> Iterator[bytes]:
    """A body that repeats nothing."""
    block = hashlib.shake_256(b"body").digest(PIECE)
    for number in range(size // PIECE):
        yield number.to_bytes(8) + block[8:]


@pytest.fixture(scope="module")
def expected() -> str:
    digest = hashlib.sha256()
    for piece in pieces():
        digest.update(piece)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[Proxy]:
    found = start(tmp_path_factory.mktemp("bodies"), "--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    yield found
    assert found.stop() == 0


@pytest.fixture
def proxy(process: Proxy) -> Proxy:
    return process.from_now()


@pytest.fixture(scope="module")
def lazy_process(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[Proxy]:
    """Agrees with the client on HTTP/2 before it knows what the server speaks: so the two may differ."""
    options = ("--set", f"ssl_verify_upstream_trusted_ca={trusted}", "--set", "connection_strategy=lazy")
    found = start(tmp_path_factory.mktemp("lazy"), *options)
    yield found
    assert found.stop() == 0


@pytest.fixture
def lazy(lazy_process: Proxy) -> Proxy:
    return lazy_process.from_now()


class Memory:
    """How much more than at first a process has held."""

    def __init__(self, process: int) -> None:
        self._folder = Path(f"/proc/{process}")
        self._before = self._read("VmRSS")
        (self._folder / "clear_refs").write_text("5")  # the peak begins anew

    def grown(self) -> int:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> int:
        line = next(line for line in (self._folder / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


class Origin:
    """A server of one kind: gives the body, and takes it. `sent` and `received` count, `digest` is what came.

    It writes nothing more while the peer does not read: `stalled` is set when that lasts. It reads only while
    `reading` is set.
    """

    def __init__(self, framing: str) -> None:
        self.framing = framing
        self.port = 0
        self.sent = [0]
        self.received = 0
        self.hash = hashlib.sha256()
        self.stalled = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.peers: list[H2Peer] = []

    async def http1(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if head.startswith(b"get /small"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        elif head.startswith(b"get"):
            await self._give(writer)
        else:
            await self._take(reader, b"chunked" in head)
            answer = self.hash.hexdigest().encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        writer.close()

    async def _give(self, writer: asyncio.StreamWriter) -> None:
        chunked = self.framing == "chunked"
        lines = {
            "tls": b"Content-Length: %d" % SIZE,
            "length": b"Content-Length: %d" % SIZE,
            "chunked": b"Transfer-Encoding: chunked",
        }
        writer.write(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % lines.get(self.framing, b"Connection: close"))
        for piece in pieces():
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await patiently(writer.drain(), self.stalled)
            self.sent[0] += len(piece)
        if chunked:
            writer.write(b"0\r\n\r\n")

    async def _take(self, reader: asyncio.StreamReader, chunked: bool) -> None:
        left = int((await reader.readuntil(b"\r\n"))[:-2], 16) if chunked else SIZE
        while left:
            await self.reading.wait()
            data = await reader.read(min(left, PIECE))
            assert data
            self.hash.update(data)
            self.received += len(data)
            left -= len(data)
            if chunked and not left:
                await reader.readexactly(2)
                left = int((await reader.readuntil(b"\r\n"))[:-2], 16)

    async def http2(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def take(_: int, data: bytes) -> None:
            self.hash.update(data)
            self.received += len(data)

        peer = H2Peer(reader, writer, client=False, window=1 << 20, take=take)
        peer.pause_all = not self.reading.is_set()
        self.peers.append(peer)
        begun: dict[int, asyncio.Task[None]] = {}
        while not peer.task.done():
            await peer.until(lambda: peer.task.done() or set(peer.streams) - set(begun), 600)
            for number in set(peer.streams) - set(begun):
                begun[number] = asyncio.create_task(self._answer(peer, number))
        await asyncio.gather(*begun.values(), return_exceptions=True)

    async def _answer(self, peer: H2Peer, number: int) -> None:
        await peer.until(lambda: peer.streams[number].headers)
        asked = dict(peer.streams[number].headers)
        if asked[":method"] != "GET":
            await peer.until(lambda: peer.streams[number].ended, 600)
        await peer.head(number, [(":status", "200")])
        if asked[":path"] == "/small":
            await peer.body(number, [b"ok"])
        elif asked[":method"] == "GET":
            await peer.body(number, pieces(), sent=self.sent, stalled=self.stalled)
        else:
            await peer.body(number, [self.hash.hexdigest().encode()])


@contextlib.asynccontextmanager
async def serving(framing: str, authority: trustme.CA, *, slow: bool = False) -> AsyncIterator[Origin]:
    """`length`, `chunked`, `close` over HTTP; `tls` is HTTP/1.1 over TLS, `h2` HTTP/2."""
    origin = Origin(framing)
    tls = None if framing not in ("tls", "h2") else server_context(authority, "127.0.0.1")
    if framing == "h2":
        tls = server_context(authority, "127.0.0.1", alpn=("h2",))
    listener = socket.create_server(("127.0.0.1", 0))
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if slow else ():
        listener.setsockopt(socket.SOL_SOCKET, option, KERNEL)
    answer = origin.http2 if framing == "h2" else origin.http1
    server = await asyncio.start_server(answer, sock=listener, ssl=tls)
    origin.port = listener.getsockname()[1]
    try:
        yield origin
    finally:
        for peer in origin.peers:
            await peer.close()
        server.close()


def assert_recorded(found: list[Any], side: str, expected: str) -> None:
    flow = max(flows(found), key=lambda flow: flow.request.body.size + flow.response.body.size)
    stored = flow.request.body if side == "request" else flow.response.body
    assert (stored.size, stored.truncated, stored.sha256.hex()) == (SIZE, True, expected)
    kept = body(found, flow, side)
    assert kept == b"".join(pieces(CAP)) and len(kept) == CAP


@pytest.mark.parametrize(
    ("framing", "scheme", "flag"),
    [
        ("length", "http", "--http1.1"),
        ("chunked", "http", "--http1.1"),
        ("close", "http", "--http1.1"),
        ("tls", "https", "--http1.1"),
        ("h2", "https", "--http2"),
    ],
)
async def test_download(
    proxy: Proxy, authority: trustme.CA, expected: str, framing: str, scheme: str, flag: str
) -> None:
    async with serving(framing, authority) as origin:
        memory = Memory(proxy.process.pid)
        digest = await download(proxy, f"{scheme}://127.0.0.1:{origin.port}/", flag)
        assert digest == expected
        assert memory.grown() < GROWTH
    assert_recorded(await proxy.until(lambda found: bool(flows(found))), "response", expected)


async def download(proxy: Proxy, url: str, *arguments: str) -> str:
    """The sha256 of what curl got."""
    command = ["curl", "-sS", "-m", "600", "-x", proxy.url, "--cacert", str(proxy.ca), "-N", *arguments, url]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    digest = hashlib.sha256()
    while data := await process.stdout.read(PIECE):
        digest.update(data)
    assert await process.wait() == 0
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("framing", "scheme", "arguments"),
    [
        ("length", "http", ("--http1.1",)),
        ("length", "http", ("--http1.1", "-H", "Transfer-Encoding: chunked")),
        ("tls", "https", ("--http1.1",)),
        ("h2", "https", ("--http2",)),
    ],
)
async def test_upload(
    proxy: Proxy,
    authority: trustme.CA,
    expected: str,
    tmp_path: Path,
    framing: str,
    scheme: str,
    arguments: tuple[str, ...],
) -> None:
    upload = tmp_path / "upload"
    await asyncio.to_thread(_write, upload)
    async with serving(framing, authority) as origin:
        memory = Memory(proxy.process.pid)
        more = ("-T", str(upload), "-H", "Expect:", "-m", "600", *arguments)
        answer = await curl(proxy, f"{scheme}://127.0.0.1:{origin.port}/up", *more)
        assert answer.body.decode() == expected and origin.received == SIZE
        assert memory.grown() < GROWTH
    assert_recorded(await proxy.until(lambda found: bool(flows(found))), "request", expected)


def _write(path: Path) -> None:
    with path.open("wb") as file:
        file.writelines(pieces())


@pytest.mark.parametrize("framing", ["tls", "h2"])
async def test_an_http2_client_that_does_not_read_a_stream_holds_up_its_server_alone(
    lazy: Proxy, authority: trustme.CA, expected: str, framing: str
) -> None:
    async with serving(framing, authority, slow=True) as origin:
        memory = Memory(lazy.process.pid)
        got: dict[int, Any] = {1: hashlib.sha256(), 3: hashlib.sha256()}

        def take(number: int, data: bytes) -> None:
            got[number].update(data)

        client = await h2peer.connect(lazy, origin.port, window=1 << 17, take=take)
        client.paused.add(1)
        await client.head(1, h2peer.request(origin.port, "/"), end=True)
        await asyncio.wait_for(origin.stalled.wait(), 60)
        await another_goes_on(client, origin)
        assert origin.sent[0] < SIZE / 2 and memory.grown() < GROWTH
        await client.resume(1)
        await client.until(lambda: client.streams[1].ended, 600)
        await client.close()
        assert (got[1].hexdigest(), got[3].digest()) == (expected, hashlib.sha256(b"ok").digest())
        assert memory.grown() < GROWTH
    assert_recorded(await lazy.until(lambda found: len(flows(found)) == 2), "response", expected)


@pytest.mark.parametrize("framing", ["tls", "h2"])
async def test_a_server_that_does_not_read_holds_up_one_stream_of_an_http2_client(
    lazy: Proxy, authority: trustme.CA, expected: str, framing: str
) -> None:
    async with serving(framing, authority, slow=True) as origin:
        origin.reading.clear()
        memory = Memory(lazy.process.pid)
        client, sent, stalled = await h2peer.connect(lazy, origin.port), [0], asyncio.Event()
        await client.head(1, h2peer.request(origin.port, "/", "POST"))
        sending = asyncio.create_task(client.body(1, pieces(), sent=sent, stalled=stalled))
        await asyncio.wait_for(stalled.wait(), 60)
        await another_goes_on(client, origin)
        assert sent[0] < SIZE / 2 and memory.grown() < GROWTH
        origin.reading.set()
        for peer in origin.peers:
            for number in list(peer.streams):
                await peer.resume(number)
        await sending
        await client.until(lambda: client.streams[1].ended, 600)
        assert client.streams[1].data.decode() == expected
        await client.close()
        assert memory.grown() < GROWTH
    assert_recorded(await lazy.until(lambda found: len(flows(found)) == 2), "request", expected)


async def another_goes_on(client: H2Peer, origin: Origin) -> None:
    await client.head(3, h2peer.request(origin.port, "/small"), end=True)
    await client.until(lambda: 3 in client.streams and client.streams[3].ended)


async def test_a_client_that_does_not_read_holds_up_the_server(
    proxy: Proxy, authority: trustme.CA, expected: str
) -> None:
    async with serving("length", authority, slow=True) as origin:
        memory = Memory(proxy.process.pid)
        reader, writer = await h2peer.dial(proxy)
        writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port)
        await asyncio.wait_for(origin.stalled.wait(), 60)
        assert origin.sent[0] < SIZE and memory.grown() < GROWTH
        await reader.readuntil(b"\r\n\r\n")
        digest = hashlib.sha256()
        for _ in range(SIZE // PIECE):
            digest.update(await reader.readexactly(PIECE))
        writer.close()
        assert digest.hexdigest() == expected and memory.grown() < GROWTH
    assert_recorded(await proxy.until(lambda found: bool(flows(found))), "response", expected)


async def test_a_server_that_does_not_read_holds_up_the_client(
    proxy: Proxy, authority: trustme.CA, expected: str
) -> None:
    async with serving("length", authority, slow=True) as origin:
        origin.reading.clear()
        memory = Memory(proxy.process.pid)
        stalled, sent = asyncio.Event(), [0]
        reader, writer = await h2peer.dial(proxy)
        head = b"POST http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % (origin.port, SIZE))
        sending = asyncio.create_task(_send(writer, sent, stalled))
        await asyncio.wait_for(stalled.wait(), 60)
        assert sent[0] < SIZE and memory.grown() < GROWTH
        origin.reading.set()
        await sending
        assert (await reader.read()).endswith(expected.encode())
        writer.close()
        assert memory.grown() < GROWTH
    assert_recorded(await proxy.until(lambda found: bool(flows(found))), "request", expected)


async def _send(writer: asyncio.StreamWriter, sent: list[int], stalled: asyncio.Event) -> None:
    for piece in pieces():
        writer.write(piece)
        await patiently(writer.drain(), stalled)
        sent[0] += len(piece)
