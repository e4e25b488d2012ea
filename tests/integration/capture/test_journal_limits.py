"""The journal at its cap, with both policies, and on a full disk: the traffic goes on, and every drop is counted."""

import asyncio
import re
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from megido_shared import events
from megido_shared.bus.base import Consumer
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import INGESTED
from megido_shared.datadir import DataDir
from megido_shared.events import FlowCompleted, NodeStatus
from tests.integration.capture.harness import Proxy, capture, flows, read_events
from tests.integration.capture.upstream import Upstream

BODY = 100_000
CAP = 1 << 20


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    try:
        async with asyncio.timeout(30):
            while not await condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within 30 s: {what}") from None


class Client:
    """Keeps a ledger of what was answered, in order."""

    def __init__(self, proxy: Proxy, upstream: Upstream) -> None:
        self._http = httpx.AsyncClient(proxy=proxy.url, timeout=30, trust_env=False)
        self._url = f"http://127.0.0.1:{upstream.port}"
        self.sent = 0
        self.answered: list[str] = []

    async def get(self, path: str = f"length/{BODY}") -> None:
        self.sent += 1
        target = f"/{path}?{self.sent}"
        answer = await self._http.get(self._url + target)
        assert answer.status_code == 200
        self.answered.append(target)

    async def close(self) -> None:
        await self._http.aclose()


async def metrics(proxy: Proxy) -> dict[str, float]:
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(f"http://127.0.0.1:{proxy.metrics_port}/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(megido_\S+) (\S+)$", text, re.MULTILINE)}


async def dropped(proxy: Proxy, reason: str) -> float:
    return (await metrics(proxy))[f'megido_capture_dropped_total{{reason="{reason}"}}']


@asynccontextmanager
async def reader(data_dir: Path) -> AsyncIterator[Consumer]:
    """A group that pins, as ingest does."""
    consumer = await LocalBus(DataDir(data_dir)).consumer("ingest", INGESTED, pins=True)
    try:
        yield consumer
    finally:
        await consumer.close()


async def store_all(consumer: Consumer, into: list[str]) -> None:
    """What ingest does: reads, stores, acknowledges."""
    while batch := await consumer.poll(timeout=0.2):
        assert not batch.gaps
        for event in [events.decode(record.value) for record in batch.records]:
            if isinstance(event, FlowCompleted):
                into.append(event.request.target.decode())
        await consumer.commit(batch.positions())


async def test_at_the_cap_drop_newest_serves_on_counts_exactly_and_recovers(tmp_path: Path, upstream: Upstream) -> None:
    stored: list[str] = []
    async with capture(tmp_path / "data", "--journal-cap", "1MiB") as proxy:
        client = Client(proxy, upstream)
        async with reader(tmp_path / "data") as ingest:
            for _ in range(20):
                await client.get()
            lost = await dropped(proxy, "cap")
            assert 20 - CAP // BODY <= lost < 20
            assert (await metrics(proxy))["megido_capture_journal_bytes"] <= CAP
            await store_all(ingest, stored)
            assert len(stored) + lost == 20
            assert client.answered[: len(stored)] == stored, "the newest are dropped"

            async def emptied() -> bool:
                return (await metrics(proxy))["megido_capture_journal_bytes"] == 0

            await until(emptied, "what was acknowledged is freed")
            for _ in range(5):
                await client.get()
            await store_all(ingest, stored)
            assert stored[-5:] == client.answered[-5:]
        await client.close()
        assert await asyncio.to_thread(proxy.stop) == 0
    last = [event for event in await read_events(tmp_path / "data") if isinstance(event, NodeStatus)][-1]
    assert last.counters["dropped:cap"] == last.counters["dropped"] == lost
    assert last.captured == 25 == len(stored) + last.counters["dropped_terminal"]


async def test_block_holds_new_requests_alone_until_there_is_room(tmp_path: Path, upstream: Upstream) -> None:
    stored: list[str] = []
    block = ("--journal-cap", "1MiB", "--journal-policy", "block", "--journal-wait", "60")
    async with capture(tmp_path / "data", *block) as proxy:
        client = Client(proxy, upstream)
        async with reader(tmp_path / "data") as ingest:
            upstream.release.clear()
            begun = asyncio.create_task(client.get("sse/2"))
            await until(lambda: seen(upstream, b"/sse"), "a flow is under way")
            last = await until_one_waits(client, proxy)
            more = [asyncio.create_task(client.get()) for _ in range(5)]
            await until(lambda: more_than(proxy, 5), "all of them wait")
            asked = len(upstream.seen)
            upstream.release.set()
            await asyncio.wait_for(begun, 30)
            assert not any(task.done() for task in (last, *more))
            assert len(upstream.seen) == asked, "what waits is not upstream yet"
            await store_all(ingest, stored)
            await asyncio.wait_for(asyncio.gather(last, *more), 30)
            await store_all(ingest, stored)
        assert sorted(stored) == sorted(client.answered)
        assert await dropped(proxy, "cap") == 0
        await client.close()
        assert await asyncio.to_thread(proxy.stop) == 0


async def test_block_holds_a_websocket_message_before_it_goes_on(tmp_path: Path, upstream: Upstream) -> None:
    stored: list[str] = []
    block = ("--journal-cap", "1MiB", "--journal-policy", "block", "--journal-wait", "600")
    arrived: list[object] = []

    async def keep(connection: ServerConnection) -> None:
        async for message in connection:
            arrived.append(message)

    async with capture(tmp_path / "data", *block) as proxy, serve(keep, "127.0.0.1", 0) as server:
        client = Client(proxy, upstream)
        port = next(iter(server.sockets)).getsockname()[1]
        async with (
            reader(tmp_path / "data") as ingest,
            connect(f"ws://127.0.0.1:{port}/", proxy=proxy.url, ping_interval=None) as socket,
        ):
            await socket.send("free")
            await until(lambda: anything(arrived), "a message with room goes on")
            held = await until_one_waits(client, proxy)
            await socket.send("held")
            await until(lambda: more_than(proxy, 1), "the message waits")
            assert arrived == ["free"]
            await store_all(ingest, stored)
            await until(lambda: more_arrived(arrived), "the message goes on")
            await asyncio.wait_for(held, 30)
        assert arrived == ["free", "held"]
        assert await dropped(proxy, "cap") == 0
        await client.close()
        assert await asyncio.to_thread(proxy.stop) == 0


async def anything(arrived: list[object]) -> bool:
    return bool(arrived)


async def more_arrived(arrived: list[object]) -> bool:
    return len(arrived) > 1


async def until_one_waits(client: Client, proxy: Proxy) -> asyncio.Task[None]:
    """Requests one after the other; the first that finds the journal nearly full."""
    async with asyncio.timeout(60):
        while True:
            asked = asyncio.create_task(client.get())
            while not asked.done():
                if await waits(proxy):
                    return asked
                await asyncio.sleep(0.02)
            await asked


async def seen(upstream: Upstream, path: bytes) -> bool:
    return any(path in head for head in upstream.seen)


async def waits(proxy: Proxy) -> float:
    return (await metrics(proxy)).get('megido_capture_events_total{name="journal_waits"}', 0)


async def more_than(proxy: Proxy, count: int) -> bool:
    return await waits(proxy) > count


async def test_a_wait_that_is_over_lets_the_traffic_go_on_and_counts(tmp_path: Path, upstream: Upstream) -> None:
    block = ("--journal-cap", "1MiB", "--set", "journal_policy=block", "--set", "journal_wait=1")
    async with capture(tmp_path / "data", *block) as proxy:
        client = Client(proxy, upstream)
        async with reader(tmp_path / "data"):
            while await waits(proxy) == 0:
                await client.get()
            await asyncio.gather(*(client.get() for _ in range(12)))
            assert len(client.answered) == client.sent
            figures = await metrics(proxy)
            given_up = figures['megido_capture_events_total{name="journal_waits_given_up"}']
            assert given_up == await waits(proxy) == 13
            lost = await dropped(proxy, "cap")
            assert lost > 0
        await client.close()
        assert await asyncio.to_thread(proxy.stop) == 0
    recorded = flows(await read_events(tmp_path / "data"))
    assert len(recorded) + lost == len(client.answered)


async def test_a_stop_does_not_wait_for_those_who_wait(tmp_path: Path, upstream: Upstream) -> None:
    block = ("--journal-cap", "1MiB", "--journal-policy", "block", "--journal-wait", "600")
    async with capture(tmp_path / "data", *block) as proxy:
        client = Client(proxy, upstream)
        task = await until_one_waits(client, proxy)
        assert await asyncio.to_thread(proxy.stop) == 0
        await asyncio.wait_for(task, 30)
        await client.close()


def limit_files(pid: int, size: int) -> None:
    """The kernel lets no file of the process grow beyond `size`: a write is cut short there, and refused behind it, as
    on a full disk (the error is EFBIG in place of ENOSPC)."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]))


async def test_a_full_disk_drops_counts_exactly_and_recovers_without_a_restart(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with capture(tmp_path / "data") as proxy:
        client = Client(proxy, upstream)
        for _ in range(3):
            await client.get()
        limit_files(proxy.process.pid, 4 * BODY)
        for _ in range(10):
            await client.get()
        full = await metrics(proxy)
        limit_files(proxy.process.pid, resource.RLIM_INFINITY)
        for _ in range(3):
            await client.get()
        await client.close()
        assert await asyncio.to_thread(proxy.stop) == 0
    found = await read_events(tmp_path / "data")
    recorded = {event.request.target.decode() for event in flows(found)}
    last = [event for event in found if isinstance(event, NodeStatus)][-1]
    lost = sum(full[f'megido_capture_dropped_total{{reason="{reason}"}}'] for reason in ("disk", "short_write"))
    assert lost >= 9
    assert len(recorded) + last.counters["dropped_terminal"] == len(client.answered) == last.captured
    assert {*client.answered[:3], *client.answered[-3:]} <= recorded


@pytest.mark.parametrize(
    ("option", "message"),
    [("journal_cap=1kB", "1048576 bytes at least"), ("journal_policy=wait", "drop_newest or block")],
)
async def test_what_cannot_work_is_refused(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        async with capture(tmp_path / "data", "--set", option):
            pass
