"""The forwarder as a process of its own: to a real Kafka that fails, and to an API over HTTP."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import msgspec
import pytest
from scripts.kafka import Node, free_port

from megido_shared import events
from megido_shared.bus.base import Record
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.local import Journal, LocalBus
from megido_shared.bus.local.groups import free_limit
from megido_shared.bus.topics import FLOWS, INGESTED, NODES
from megido_shared.datadir import DataDir
from megido_shared.testing import a_completed_flow

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


@contextlib.contextmanager
def forwarder(data: DataDir, *arguments: str, token: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "megido_shared.bus.forwarder", "--data-dir", str(data.root), *arguments]
    environment = {**os.environ, "MEGIDO_API_TOKEN": token}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> float:
    """SIGTERM; seconds until it had exited with 0."""
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0
    return time.monotonic() - begin


def publish(journal: Journal, count: int) -> list[events.FlowCompleted]:
    flows = [a_completed_flow(node=journal.node, epoch=journal.epoch, seq=journal.next_seq()) for _ in range(count)]
    assert all(journal.publish(flow) for flow in flows)
    return flows


async def consumed(bus: KafkaBus, wanted: int, group: str = "test") -> list[Record]:
    consumer = await bus.consumer(group, [FLOWS])
    found: list[Record] = []
    async with asyncio.timeout(60):
        while len({record.value for record in found}) < wanted:
            found += (await consumer.poll()).records
    await consumer.close()
    return found


@pytest.mark.kafka
async def test_an_outage_of_the_broker_delays_and_loses_nothing(data: DataDir, fresh_kafka: Node) -> None:
    journal = Journal.open(data, "capture", segment_bytes=50_000)
    first = publish(journal, 200)
    with forwarder(data, "--kafka", fresh_kafka.bootstrap) as process:
        bus = KafkaBus(fresh_kafka.bootstrap)
        await _until_topics(bus)
        await consumed(bus, 200)
        fresh_kafka.kill()
        second = publish(journal, 300)
        await asyncio.sleep(1)  # the outage lasts; nothing to wait for
        third = publish(journal, 300)
        await asyncio.to_thread(fresh_kafka.start)
        records = await consumed(bus, 800, "after")
        assert end(process) < 15
    published = [*first, *second, *third]
    assert {record.value for record in records} == {events.encode(flow) for flow in published}
    order = {flow.event_id: flow.seq for flow in published}
    for partition in {record.stream for record in records}:
        seqs = [order[events.decode(r.value).event_id] for r in records if r.stream == partition]
        firsts = list(dict.fromkeys(seqs))
        assert firsts == sorted(firsts), "in order, but for repetitions"
    await bus.close()
    journal.close()
    assert journal.dropped == 0


async def _until_topics(bus: KafkaBus) -> None:
    async with asyncio.timeout(60):
        while FLOWS.name not in await bus.topics():
            await asyncio.sleep(0.1)


@pytest.mark.kafka
async def test_slots_whose_writer_died_are_shipped_and_a_restart_repeats_nothing(data: DataDir, kafka: str) -> None:
    journal = Journal.open(data, "capture")
    mine = {events.encode(flow) for flow in publish(journal, 50)}
    epoch, written = journal.epoch.hex(), max(record.next_offset for record in journal.read_back(FLOWS.name))
    journal.close()
    bus = KafkaBus(kafka)
    with forwarder(data, "--kafka", kafka) as process:
        await _until_topics(bus)
        group = f"count-{os.getpid()}-{time.monotonic_ns()}"
        consumer = await bus.consumer(group, [FLOWS])
        seen: list[bytes] = []
        async with asyncio.timeout(60):
            while sum(value in mine for value in seen) < 50:
                seen += [record.value for record in (await consumer.poll()).records]
            # What is on Kafka is not acknowledged yet: stopped in between, it would rightly be shipped again.
            while free_limit(data, epoch, FLOWS.name) != written:
                await asyncio.sleep(0.02)
        end(process)
    again = Journal.open(data, "capture")
    more = {events.encode(flow) for flow in publish(again, 10)}
    with forwarder(data, "--kafka", kafka) as process:
        async with asyncio.timeout(60):
            while sum(value in more for value in seen) < 10:
                seen += [record.value for record in (await consumer.poll()).records]
        end(process)
    assert sum(value in mine for value in seen) == 50
    await consumer.close()
    await bus.close()
    again.close()


@pytest.mark.kafka
def test_sigterm_ends_it_in_time_with_the_broker_away(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    publish(journal, 10)
    with forwarder(data, "--kafka", f"127.0.0.1:{free_port()}", "--metrics-port", "0") as process:
        port = _metrics_port(process)
        _wait(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503)
        assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        assert end(process) < 15
    journal.close()


def _metrics_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    found = re.search(r"metrics on 127\.0\.0\.1:(\d+)", process.stdout.readline())
    assert found
    return int(found[1])


def _wait(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Api(BaseHTTPRequestHandler):
    """The receiving end: remembers what it took; `answer` decides."""

    taken: ClassVar[list[tuple[str, bytes, bytes]]]
    tokens: ClassVar[list[str | None]]
    answer: ClassVar[Callable[[list[tuple[str, bytes, bytes]]], int]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/proxy/api/events/"
        assert self.headers["Content-Type"] == "application/msgpack"
        records = msgspec.msgpack.decode(body, type=list[tuple[str, bytes, bytes]])
        status = type(self).answer(records)
        type(self).tokens.append(self.headers["Authorization"])
        if status == 200:
            type(self).taken.extend(records)
        answer = b'{"accepted": %d}' % len(records)
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[tuple[type[Api], str]]:
    handler = type("Handler", (Api,), {"taken": [], "tokens": [], "answer": staticmethod(lambda records: 200)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_over_http_every_record_arrives_in_order_with_the_token(data: DataDir, api: tuple[type[Api], str]) -> None:
    handler, url = api
    answers = iter([503, 500, 401])
    handler.answer = staticmethod(lambda records: next(answers, 200))
    journal = Journal.open(data, "capture")
    flows = publish(journal, 100)
    with forwarder(data, "--api-url", url, "--metrics-port", "0", token="secret") as process:
        port = _metrics_port(process)
        _wait(lambda: len(handler.taken) >= 100)
        assert handler.taken == [(FLOWS.name, flow.flow_id, events.encode(flow)) for flow in flows]
        assert set(handler.tokens) == {"Bearer secret"}
        _wait(lambda: 'megido_forwarder_records_total{topic="megido.flows"} 100.0' in _metrics(port))
        _wait(lambda: "megido_forwarder_lag_bytes 0.0" in _metrics(port))
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        assert end(process) < 15
    with forwarder(data, "--api-url", url) as process:
        more = publish(journal, 1)
        _wait(lambda: len(handler.taken) > 100)
        end(process)
    assert handler.taken[100:] == [(FLOWS.name, more[0].flow_id, events.encode(more[0]))]
    journal.close()


def _metrics(port: int) -> str:
    return httpx.get(f"http://127.0.0.1:{port}/metrics").text


def test_a_record_that_the_api_refuses_does_not_hold_up_its_neighbours(
    data: DataDir, api: tuple[type[Api], str]
) -> None:
    handler, url = api
    handler.answer = staticmethod(lambda records: 400 if any(value == b"bad" for _, _, value in records) else 200)
    journal = Journal.open(data, "capture")
    values = [b"%d" % n for n in range(20)]
    values.insert(7, b"bad")
    for value in values:
        assert journal.append(NODES.name, b"k", value)
    with forwarder(data, "--api-url", url, "--metrics-port", "0") as process:
        port = _metrics_port(process)
        _wait(lambda: len(handler.taken) >= 20)
        assert [value for _, _, value in handler.taken] == [value for value in values if value != b"bad"]
        _wait(lambda: "megido_forwarder_refused_total 1.0" in _metrics(port))
        end(process)
    journal.close()


async def test_it_stands_aside_while_ingest_reads_the_same_directory(data: DataDir, api: tuple[type[Api], str]) -> None:
    handler, url = api
    journal = Journal.open(data, "capture")
    flows = publish(journal, 10)
    ingest = await LocalBus(data).consumer("ingest", INGESTED, pins=True)
    batch = await ingest.poll(timeout=10)
    assert len(batch.records) == 10
    await ingest.commit({batch.records[0].stream: batch.records[7].next_offset})
    with forwarder(data, "--api-url", url, "--metrics-port", "0") as process:
        port = await asyncio.to_thread(_metrics_port, process)
        acks = data.groups / "forwarder" / "acks"
        await asyncio.to_thread(_wait, lambda: acks.exists() and any(acks.iterdir()))
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        assert handler.taken == []
        await ingest.close()
        await asyncio.to_thread(_wait, lambda: len(handler.taken) >= 2)
        await asyncio.to_thread(end, process)
    assert [value for _, _, value in handler.taken] == [events.encode(flow) for flow in flows[8:]]
    journal.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "--kafka HOST:PORT or --api-url URL"), (("--api-url", "localhost:8000"), "must begin with http")],
)
def test_bad_configuration_is_one_line_and_exit_2(data: DataDir, arguments: tuple[str, ...], message: str) -> None:
    with forwarder(data, *arguments) as process:
        assert process.wait(timeout=30) == 2
        assert process.stderr
        error = process.stderr.read()
    assert message in error
    assert error.count("\n") == 1
