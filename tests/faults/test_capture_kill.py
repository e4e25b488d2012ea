"""kill -9 of the proxy under load: what a client completed is in the journal, once.

MEGIDO_KILLS (6) sets the number of kills, MEGIDO_SEED the seed. Each request carries an id of its own; the
client's ledger holds those whose answer it received whole, and is compared with the journal.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megido_shared.events import FlowCompleted, FlowInterrupted
from tests.integration.capture.harness import Proxy, body, read_events, start
from tests.integration.capture.upstream import body_of_size, serving

KILLS = int(os.environ.get("MEGIDO_KILLS", "6"))
SEED = int(os.environ.get("MEGIDO_SEED", "0")) or random.SystemRandom().randrange(1 << 30)
CLIENTS = 12
TARGETS = (
    ("plain/{}", 6),
    ("length/600000?{}", 1),
    ("chunked/30000?{}", 2),
    ("sse/3?{}", 2),
    ("close/9000?{}", 2),
    ("count/length/{}", 1),
    ("count/chunked/{}", 1),
)
"""Path and weight. The id stands in the path, so it is in the recorded target."""
UPLOAD = body_of_size(600_000)
"""What is posted to `count`: above what is held, so it streams."""


@dataclass
class Ledger:
    completed: dict[str, int] = field(default_factory=dict)
    """Target to the size of the answer's body, for answers that ended as their framing says."""
    failed: int = 0


async def client(number: int, ledger: Ledger, where: list[Proxy], upstream: int, stop: asyncio.Event) -> None:
    rng = random.Random(f"{SEED}/{number}")
    paths, weights = zip(*TARGETS, strict=True)
    count = 0
    while not stop.is_set():
        target = "/" + rng.choices(paths, weights)[0].format(f"{number}-{count}")
        count += 1
        try:
            size = await asyncio.wait_for(exchange(where[0].port, upstream, target), 10)
        except (OSError, EOFError, TimeoutError, ValueError):
            ledger.failed += 1
            await asyncio.sleep(0.1)
        else:
            ledger.completed[target] = size


async def exchange(port: int, upstream: int, target: str) -> int:
    """The body's size, once the answer is complete: by its length, its last chunk, or the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        method, framing, upload = request_of(target)
        writer.write(f"{method} http://127.0.0.1:{upstream}{target} HTTP/1.1\r\nHost: x\r\n{framing}\r\n".encode())
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
    finally:
        writer.close()


def request_of(target: str) -> tuple[str, str, bytes]:
    """Method, header line and body."""
    if not target.startswith("/count"):
        return "GET", "", b""
    if target.startswith("/count/length"):
        return "POST", f"Content-Length: {len(UPLOAD)}\r\n", UPLOAD
    return "POST", "Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(UPLOAD), UPLOAD)


@contextlib.asynccontextmanager
async def load(where: list[Proxy]) -> AsyncIterator[Ledger]:
    async with serving() as upstream:
        ledger, stop = Ledger(), asyncio.Event()
        clients = [asyncio.create_task(client(n, ledger, where, upstream.port, stop)) for n in range(CLIENTS)]
        try:
            yield ledger
        finally:
            stop.set()
            await asyncio.gather(*clients)


@pytest.mark.timeout(120 + 20 * KILLS)
async def test_kill_loses_nothing_that_a_client_completed(tmp_path: Path) -> None:
    print(f"seed {SEED}, {KILLS} kills")
    rng = random.Random(SEED)
    data_dir = tmp_path / "data"
    where = [await asyncio.to_thread(start, data_dir)]
    port = where[0].port
    async with load(where) as ledger:
        for _ in range(KILLS):
            served = len(ledger.completed)
            deadline = time.monotonic() + 30
            while len(ledger.completed) < served + 100:
                assert time.monotonic() < deadline, "the proxy serves nobody"
                await asyncio.sleep(0.02)
            await asyncio.sleep(rng.random() * 0.2)
            where[0].process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(where[0].process.wait)
            began = time.monotonic()
            where[0] = await asyncio.to_thread(start, data_dir, port=port)
            print(f"listening again after {time.monotonic() - began:.1f} s, {len(ledger.completed)} completed")
    assert await asyncio.to_thread(where[0].stop) == 0
    check(ledger, await read_events(data_dir))


def check(ledger: Ledger, found: list[Any]) -> None:
    ends = [event for event in found if getattr(event, "request", None) is not None and event.seq]
    by_flow = Counter(event.flow_id for event in ends)
    doubled = [flow for flow, count in by_flow.items() if count > 1]
    recorded: dict[str, list[Any]] = {}
    for event in ends:
        recorded.setdefault(event.request.target.decode(), []).append(event)
    lost, cut = [], 0
    for target, size in ledger.completed.items():
        events = recorded.get(target, [])
        whole = [event for event in events if isinstance(event, FlowCompleted)]
        if not whole and target.startswith("/close"):
            # A kill looks like the body's end to the client: what it got is there, marked as interrupted.
            whole = [e for e in events if isinstance(e, FlowInterrupted) and e.response.body.size >= size]
            cut += bool(whole)
        if not whole:
            lost.append((target, size))
    print(f"{len(ledger.completed)} completed, {ledger.failed} failed at the client, {cut} interrupted ends")
    assert not lost and not doubled
    seqs = [event.seq for event in found if event.seq]
    assert len(seqs) == len(set(seqs)), "a sequence number was given twice"
    uploads = [e for e in ends if isinstance(e, FlowCompleted) and e.request.target.startswith(b"/count")]
    assert uploads and all(body(found, event, "request") == UPLOAD for event in uploads[:100])
    sample = [event for event in ends if isinstance(event, FlowCompleted) and event.response.body.chunks]
    for event in sample[:200]:
        stored = body(found, event)
        assert len(stored) == event.response.body.size
        if event.request.target.startswith((b"/length", b"/chunked")):
            assert stored == body_of_size(len(stored))
