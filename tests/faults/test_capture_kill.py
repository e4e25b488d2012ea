"""kill -9 of the proxy under load: what a client completed is in the journal, once.

Over HTTP, over HTTPS with HTTP/1.1 and with HTTP/2. MEGIDO_KILLS (3) sets the number of kills of each, MEGIDO_SEED
the seed. Each request carries an id of its own; the client's ledger holds those whose answer it received whole, and
is compared with the journal.
"""

import asyncio
import contextlib
import os
import random
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trustme

from megido_shared.events import FlowCompleted, FlowInterrupted
from tests.faults.balance import SEED, accounts_of_events, settle
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import Proxy, body, read_events, start
from tests.integration.capture.upstream import body_of_size, send_what_fits, serving

KILLS = int(os.environ.get("MEGIDO_KILLS", "3"))
CLIENTS = 12
TARGETS = (
    ("plain/{}", 6),
    ("length/600000?{}", 1),
    ("chunked/30000?{}", 2),
    ("sse/3?{}", 2),
    ("count/length/{}", 1),
    ("count/chunked/{}", 1),
    ("close/9000?{}", 2),
)
"""Path and weight. The id stands in the path, so it is in the recorded target. The last is of HTTP/1 only."""
UPLOAD = body_of_size(600_000)
"""What is posted to `count`: above what is held, so it streams."""

type Over = Literal["http", "https", "h2"]


@dataclass
class Ledger:
    completed: dict[str, int] = field(default_factory=dict)
    """Target to the size of the answer's body, for answers that ended as their framing says."""
    failed: int = 0


class Session(Protocol):
    """One connection of a client."""

    async def exchange(self, targets: list[str], ledger: Ledger) -> bool:
        """Requests the targets and enters each answer that is complete; whether the connection goes on."""

    def close(self) -> None: ...


@dataclass
class Load:
    """What the clients need to know. The proxy is another one after each kill."""

    over: Over
    upstream: int
    proxy: Proxy
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def url(self) -> str:
        """What requests in absolute form begin with; inside a tunnel they have none."""
        return f"http://127.0.0.1:{self.upstream}" if self.over == "http" else ""


async def client(number: int, load: Load) -> None:
    rng = random.Random(f"{SEED}/{number}")
    paths, weights = zip(*(TARGETS[:-1] if load.over == "h2" else TARGETS), strict=True)
    at_once = 4 if load.over == "h2" else 1
    count = 0
    session: Session | None = None
    while not load.stop.is_set():
        chosen = rng.choices(paths, weights, k=at_once)
        targets = ["/" + path.format(f"{number}-{count + index}") for index, path in enumerate(chosen)]
        count += at_once
        try:
            async with asyncio.timeout(10):
                session = session or await connected(load)
                goes_on = await session.exchange(targets, load.ledger)
        except (OSError, EOFError, TimeoutError, ValueError):
            load.ledger.failed += sum(target not in load.ledger.completed for target in targets)
            goes_on = False
            await asyncio.sleep(0.1)
        if session is not None and not goes_on:
            session.close()
            session = None
    if session is not None:
        session.close()


async def connected(load: Load) -> Session:
    reader, writer = await asyncio.open_connection("127.0.0.1", load.proxy.port)
    try:
        if load.over == "http":
            return Http1(reader, writer, load.url)
        writer.write(b"CONNECT localhost:%d HTTP/1.1\r\nHost: x\r\n\r\n" % load.upstream)
        if b" 200 " not in await reader.readuntil(b"\r\n\r\n"):
            raise ValueError("CONNECT refused")
        context = ssl.create_default_context(cafile=str(load.proxy.ca))
        context.set_alpn_protocols(["h2" if load.over == "h2" else "http/1.1"])
        await writer.start_tls(context, server_hostname="localhost")
        return Http2(reader, writer) if load.over == "h2" else Http1(reader, writer, "")
    except BaseException:
        writer.close()
        raise


class Http1:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: str) -> None:
        self._reader, self._writer, self._url = reader, writer, url

    async def exchange(self, targets: list[str], ledger: Ledger) -> bool:
        [target] = targets
        ledger.completed[target] = await self._one(target)
        # A connection for each request over HTTP; over HTTPS, where it is dear, until the server closes it.
        return not self._url and not target.startswith("/close")

    async def _one(self, target: str) -> int:
        """The body's size, once the answer is complete: by its length, its last chunk, or the connection's end."""
        reader, writer = self._reader, self._writer
        method, framing, upload = request_of(target)
        writer.write(f"{method} {self._url}{target} HTTP/1.1\r\nHost: x\r\n{framing}\r\n".encode())
        writer.write(upload)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head.splitlines()[0]:
            raise ValueError(head)
        if b"chunked" in head:
            total = 0
            while size := int((await reader.readline()).strip() or b"z", 16):
                total += len(await reader.readexactly(size))
                await reader.readexactly(2)
            await reader.readexactly(2)
            return total
        if b"content-length: " in head:
            return len(await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0])))
        return len(await reader.read())

    def close(self) -> None:
        self._writer.close()


class Http2:
    """Several streams at once on one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._conn = conn = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        conn.initiate_connection()
        conn.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 24})
        conn.increment_flow_control_window(1 << 30)

    async def exchange(self, targets: list[str], ledger: Ledger) -> bool:
        conn = self._conn
        waiting: dict[int, str] = {}
        uploads: dict[int, memoryview] = {}
        sizes: Counter[int] = Counter()
        for target in targets:
            stream = conn.get_next_available_stream_id()
            waiting[stream] = target
            headers = [(":scheme", "https"), (":authority", "localhost"), (":path", target)]
            if target.startswith("/count"):
                headers += [("content-length", str(len(UPLOAD)))] * target.startswith("/count/length")
                uploads[stream] = memoryview(UPLOAD)
            conn.send_headers(stream, [(":method", request_of(target)[0]), *headers], end_stream=stream not in uploads)
        while waiting:
            send_what_fits(conn, uploads)
            self._writer.write(conn.data_to_send())
            data = await self._reader.read(65536)
            if not data:
                raise EOFError
            for event in conn.receive_data(data):
                match event:
                    case h2.events.ResponseReceived() if dict(event.headers or [])[":status"] != "200":
                        raise ValueError(event)
                    case h2.events.DataReceived():
                        sizes[event.stream_id] += len(event.data or b"")
                        conn.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
                    case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                        raise ValueError(event)
                    case h2.events.StreamEnded():
                        ledger.completed[waiting.pop(event.stream_id)] = sizes[event.stream_id]
        return True

    def close(self) -> None:
        self._writer.close()


def request_of(target: str) -> tuple[str, str, bytes]:
    """Method, header line and body."""
    if not target.startswith("/count"):
        return "GET", "", b""
    if target.startswith("/count/length"):
        return "POST", f"Content-Length: {len(UPLOAD)}\r\n", UPLOAD
    return "POST", "Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(UPLOAD), UPLOAD)


@contextlib.asynccontextmanager
async def loaded(over: Over, authority: trustme.CA, proxy: Proxy) -> AsyncIterator[Load]:
    alpn = "h2" if over == "h2" else "http/1.1"
    async with serving(None if over == "http" else server_context(authority, "localhost", alpn=(alpn,))) as upstream:
        load = Load(over, upstream.port, proxy)
        clients = [asyncio.create_task(client(n, load)) for n in range(CLIENTS)]
        try:
            yield load
        finally:
            load.stop.set()
            await asyncio.gather(*clients)


@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.parametrize("over", ["http", "https", "h2"])
async def test_kill_loses_nothing_that_a_client_completed(tmp_path: Path, over: Over) -> None:
    print(f"seed {SEED}, {KILLS} kills")
    rng = random.Random(SEED)
    data_dir, authority = tmp_path / "data", trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "upstream.pem"))
    options = ("--set", f"ssl_verify_upstream_trusted_ca={tmp_path / 'upstream.pem'}")
    proxy = await asyncio.to_thread(start, data_dir, *options)
    async with loaded(over, authority, proxy) as load:
        ledger = load.ledger
        for _ in range(KILLS):
            served = len(ledger.completed)
            deadline = time.monotonic() + 30
            while len(ledger.completed) < served + 100:
                assert time.monotonic() < deadline, "the proxy serves nobody"
                await asyncio.sleep(0.02)
            await asyncio.sleep(rng.random() * 0.2)
            load.proxy.process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(load.proxy.process.wait)
            began = time.monotonic()
            load.proxy = await asyncio.to_thread(start, data_dir, *options, port=proxy.port)
            print(f"listening again after {time.monotonic() - began:.1f} s, {len(ledger.completed)} completed")
    assert await asyncio.to_thread(load.proxy.stop) == 0
    check(over, ledger, await read_events(data_dir))


def check(over: Over, ledger: Ledger, found: list[Any]) -> None:
    ends = [event for event in found if getattr(event, "request", None) is not None and event.seq]
    by_flow = Counter(event.flow_id for event in ends)
    assert max(by_flow.values()) == 1
    whole = [event for event in ends if isinstance(event, FlowCompleted)]
    # A kill looks like the body's end to the client: what it got is there, marked as interrupted.
    cut = {
        target
        for event in ends
        if isinstance(event, FlowInterrupted)
        and (target := event.request.target.decode()).startswith("/close")
        and event.response is not None
        and event.response.body.size >= ledger.completed.get(target, 1 << 62)
    }
    print(f"{len(cut)} interrupted ends")
    settle(
        ledger.completed,
        [event.request.target.decode() for event in ends],
        accounts_of_events(found),
        failed=ledger.failed,
    )
    missing = ledger.completed.keys() - {event.request.target.decode() for event in whole} - cut
    assert not missing, f"{len(missing)} are not complete, {sorted(missing)[:3]} and others"
    wire = {(event.request.scheme, event.request.http_version) for event in ends}
    assert wire == {("http" if over == "http" else "https", "HTTP/2.0" if over == "h2" else "HTTP/1.1")}
    seqs = [(event.node, event.seq) for event in found if event.seq]
    assert len(seqs) == len(set(seqs)), "a sequence number was given twice"
    uploads = [e for e in ends if isinstance(e, FlowCompleted) and e.request.target.startswith(b"/count")]
    assert uploads and all(body(found, event, "request") == UPLOAD for event in uploads[:100])
    sample = [event for event in ends if isinstance(event, FlowCompleted) and event.response.body.chunks]
    for event in sample[:200]:
        stored = body(found, event)
        assert len(stored) == event.response.body.size
        if event.request.target.startswith((b"/length", b"/chunked")):
            assert stored == body_of_size(len(stored))
