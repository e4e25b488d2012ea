"""The line from a client over the proxy and its forwarder to Kafka, under load, with the client's own ledger."""

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from megido_shared import events
from megido_shared.bus.topics import FLOWS, INGESTED
from megido_shared.events import BodyChunk, FlowCompleted, FlowStarted
from tests.faults.balance import SEED, accounts_of_events, settle
from tests.integration.capture.harness import Proxy, capture
from tests.integration.capture.upstream import Upstream, serving

SECONDS = float(os.environ.get("MEGIDO_FAULT_SECONDS", "3"))
"""How long each fault lasts; `make faults` lets it last a minute."""
TOPIC = FLOWS.name
CLIENTS = 4
MORE_MB = 64
PAUSE = 0.01
"""Between two requests of a client: a few hundred a second in all."""
TARGETS = ("plain/{}", "plain/{}", "plain/{}", "length/3000?{}", "chunked/9000?{}", "sse/3?{}")


@dataclass
class Load:
    proxy: Proxy
    upstream: Upstream
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ledger: list[str] = field(default_factory=list)
    """Targets that were answered whole."""
    clients: list[asyncio.Task[None]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def more(self, count: int = 100) -> None:
        """Until so many more have been answered."""
        wanted = len(self.ledger) + count
        async with asyncio.timeout(60):
            while len(self.ledger) < wanted:
                await asyncio.sleep(0.02)

    async def finish(self) -> None:
        """Returns when every client has its last answer."""
        self.stop.set()
        await asyncio.gather(*self.clients)

    async def client(self, number: int) -> None:
        rng = random.Random(f"{SEED}/{number}")
        async with httpx.AsyncClient(proxy=self.proxy.url, timeout=30, trust_env=False) as http:
            for count in itertools.count():
                if self.stop.is_set():
                    return
                target = "/" + rng.choice(TARGETS).format(f"{number}-{count}")
                try:
                    answer = await http.get(f"http://127.0.0.1:{self.upstream.port}{target}")
                    (self.ledger if answer.status_code == 200 else self.failed).append(target)
                except httpx.HTTPError as error:
                    self.failed.append(f"{target}: {error!r}")
                await asyncio.sleep(PAUSE)

    def kill_forwarder(self) -> None:
        """What it had read, and not seen stored, must come again from the next one."""
        [pid] = (self._proc / "task" / str(self.proxy.process.pid) / "children").read_text().split()
        os.kill(int(pid), signal.SIGKILL)

    @property
    def _proc(self) -> Path:
        return Path("/proc") / str(self.proxy.process.pid)

    def memory_mb(self) -> float:
        """The proxy's own, its forwarder left out."""
        found = re.search(r"VmRSS:\s+(\d+) kB", (self._proc / "status").read_text())
        assert found
        return int(found[1]) / 1024

    async def waiting(self) -> float:
        """Bytes in the journal that are not freed yet."""
        async with httpx.AsyncClient(trust_env=False) as http:
            text = (await http.get(f"http://127.0.0.1:{self.proxy.metrics_port}/metrics")).text
        return float(re.findall(r"^megido_capture_journal_bytes (\S+)$", text, re.MULTILINE)[0])


@contextlib.asynccontextmanager
async def loaded(data_dir: Path, bootstrap: str, *options: str) -> AsyncIterator[Load]:
    """A proxy with its forwarder, and clients; every request must be answered."""
    async with serving() as upstream, capture(data_dir, "--kafka", bootstrap, "--forwarder", *options) as proxy:
        load = Load(proxy, upstream)
        load.clients = [asyncio.create_task(load.client(number)) for number in range(CLIENTS)]
        try:
            yield load
        finally:
            await load.finish()
        assert not load.failed


async def fault(load: Load) -> None:
    """Lets a fault last, under load; the proxy's memory stays where it was."""
    before = load.memory_mb()
    deadline = time.monotonic() + SECONDS
    await load.more()
    while time.monotonic() < deadline:
        await load.more(20)
    after = load.memory_mb()
    print(f"memory {after:.0f} MB, {before:.0f} before")
    assert after < before + MORE_MB


async def check(bootstrap: str, ledger: list[str], seconds: float = 90) -> list[Any]:
    """Reads the topics until everything in the ledger is there. First occurrences, which are returned, are in the order
    in which the proxy wrote them."""
    first = await arrived(bootstrap, ledger, seconds)
    _check_order([(partition, value) for topic, partition, value in first if topic == TOPIC])
    return [events.decode(value) for _, _, value in first]


async def arrived(bootstrap: str, ledger: list[str], seconds: float = 90) -> list[tuple[str, int, bytes]]:
    """Topic, partition and value of all records, read as any Kafka client does, each once: what came again is the same
    event. Waits until everything in the ledger is there."""
    await until_topic(bootstrap)
    wanted = set(ledger)
    found: list[tuple[str, int, bytes]] = []
    names = [topic.name for topic in INGESTED]
    reader = AIOKafkaConsumer(*names, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await reader.start()
    try:
        async with asyncio.timeout(seconds):
            while wanted or not await _at_end(reader):
                for records in (await reader.getmany(timeout_ms=500)).values():
                    for record in records:
                        found.append((record.topic, record.partition, record.value))
                        event = events.decode(record.value)
                        if isinstance(event, FlowCompleted):
                            wanted.discard(event.request.target.decode())
    except TimeoutError:
        raise AssertionError(f"{len(wanted)} of {len(ledger)} are lost, {sorted(wanted)[:3]} and others") from None
    finally:
        await reader.stop()
    first = list(dict.fromkeys(found))
    assert len({events.decode(value).event_id for _, _, value in first}) == len(first), "one came again, differently"
    print(f"{len(ledger)} answered, {len(found)} records on the topics, {len(found) - len(first)} of them again")
    return first


async def _at_end(reader: AIOKafkaConsumer) -> bool:
    """Of every partition that it has, as they are now."""
    ends = await reader.end_offsets(reader.assignment())
    return all([await reader.position(partition) >= end for partition, end in ends.items()])


async def check_balance(bootstrap: str, load: Load) -> None:
    """When the clients have finished: nothing is missing on the topics, of any node."""
    found = await check(bootstrap, load.ledger)
    ends = [event.request.target.decode() for event in found if isinstance(event, FlowCompleted)]
    settle(load.ledger, ends, accounts_of_events(found), failed=len(load.failed))


async def until_topic(bootstrap: str) -> None:
    """Until a forwarder has met Kafka."""
    async with asyncio.timeout(60):
        while TOPIC not in await _topics(bootstrap):
            await asyncio.sleep(0.1)


async def _topics(bootstrap: str) -> list[str]:
    """Empty while the node that the client happened to ask is away."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        await admin.start()
        found: list[str] = await admin.list_topics()
        return found
    except KafkaError:
        return []
    finally:
        await admin.close()


def _check_order(first: list[tuple[int, bytes]]) -> None:
    seqs: dict[int, list[int]] = {}
    steps: dict[bytes, list[tuple[int, int]]] = {}
    for partition, value in first:
        event = events.decode(value)
        if event.seq:
            seqs.setdefault(partition, []).append(event.seq)
        if isinstance(event, BodyChunk):
            steps.setdefault(event.flow_id, []).append((1, event.index))
        elif isinstance(event, FlowStarted | FlowCompleted):
            steps.setdefault(event.flow_id, []).append((0, 0) if isinstance(event, FlowStarted) else (2, 0))
    assert all(numbers == sorted(numbers) for numbers in seqs.values())
    assert any(len(flow) > 2 for flow in steps.values())
    assert all(flow[-1] == (2, 0) for flow in steps.values() if (2, 0) in flow)
    chunks = [[step for step in flow if step[0] == 1] for flow in steps.values()]
    assert all(flow == sorted(flow) for flow in chunks)
