"""The forwarder: how fast it drains a backlog to Kafka, and what it would cost the proxy to have it inside.

    drain   records/s of `megido_shared.bus.forwarder` over a filled journal ÷ aiokafka's `send` a record, 2,000 at a
            time, of the same values from memory
    place   requests/s and CPU of the proxy's process with the forwarder as a task of its loop ÷ as its child; nothing
            is pinned, one Kafka node, proxy, forwarder and load client share the machine

See docs/adr/0007-the-forwarder-is-a-process-of-its-own.md.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import trustme
import uvloop
from aiokafka import AIOKafkaProducer
from scripts.kafka import Node

from benchmarks.capture import Target, load, started, upstreams
from benchmarks.report import finish, ratio, say
from megido_shared import events
from megido_shared.bus.local import Journal
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir
from megido_shared.testing import a_completed_flow, a_response

IN_PROCESS = """
import asyncio, sys
from pathlib import Path
from megido_capture import __main__ as capture
from megido_capture.node import Node
from megido_shared.bus.forwarder import Forwarder, KafkaShipper, Metrics
from megido_shared.bus.open import open_bus

begin = Node.start

def start(node):
    begin(node)
    common = node.place.common
    forwarder = Forwarder(common.data_dir, KafkaShipper(open_bus(common)), yields_to_ingest=False, metrics=Metrics())
    node.shipping = asyncio.create_task(forwarder.run(asyncio.Event()))

Node.start = start
sys.exit(capture.main())
"""
BATCH = 2000


def values(count: int) -> list[tuple[bytes, bytes]]:
    """Flows with a kilobyte or two of JSON that compresses as JSON does."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        items = ",".join(str(rng.randrange(10**9)) for _ in range(180))
        flow = a_completed_flow(seq=number + 1, response=a_response(body=f'{{"items": [{items}]}}'.encode()))
        made.append((flow.flow_id, events.encode(flow)))
    return made


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def drained(directory: Path, records: list[tuple[bytes, bytes]], bootstrap: str) -> tuple[float, float]:
    """Records a second from the first batch on, and the process's microseconds of CPU a record."""
    data = DataDir(directory)
    journal = Journal.open(data, "bench")
    for seq, (key, value) in enumerate(records, 1):
        journal.append(FLOWS.name, key, value, seq)
    journal.close()
    command = [sys.executable, "-m", "megido_shared.bus.forwarder", "--data-dir", str(directory), "--kafka", bootstrap]
    with started([*command, "--metrics-port", "0"], None, subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(b":")[2])
        first: tuple[float, float, float] | None = None
        while True:
            url = f"http://127.0.0.1:{port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = re.search(
                    rb'^megido_forwarder_records_total\{topic="megido.flows"\} (\S+)', answer.read(), re.M
                )
            count, now, cpu = float(found[1]) if found else 0.0, time.monotonic(), cpu_seconds(process.pid)
            if first is None and count:
                first = count, now, cpu
            if first and count >= len(records):
                return (count - first[0]) / (now - first[1]), (cpu - first[2]) / (count - first[0]) * 1e6
            time.sleep(0.05)


async def sent(records: list[tuple[bytes, bytes]], bootstrap: str) -> float:
    """Records a second of the plain client."""
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        enable_idempotence=True,
        acks="all",
        compression_type="zstd",
        max_batch_size=1 << 20,
    )
    await producer.start()
    await producer.send_and_wait(FLOWS.name, records[0][1], key=records[0][0])
    begin = time.monotonic()
    for at in range(0, len(records), BATCH):
        waiting = [await producer.send(FLOWS.name, value, key=key) for key, value in records[at : at + BATCH]]
        await asyncio.gather(*waiting)
    took = time.monotonic() - begin
    await producer.stop()
    return len(records) / took


@contextlib.contextmanager
def proxy(where: str, directory: Path, bootstrap: str) -> Iterator[Target]:
    run = ["-c", IN_PROCESS] if where == "in_process" else ["-m", "megido_capture"]
    command = [sys.executable, *run, "--data-dir", str(directory), "--listen-port", "0", "--metrics-port", "0"]
    command += ["--kafka", bootstrap, "--forwarder" if where == "child" else "--no-forwarder"]
    with started(command, None, subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = re.search(rb"proxy on \S+?:(\d+)\b", process.stdout.readline())
        assert ready is not None, "megido capture did not start"
        yield Target(where, int(ready[1]), process)


def place(options: argparse.Namespace, directory: Path, bootstrap: str) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    authority = trustme.CA()
    with contextlib.ExitStack() as stack:
        ports = stack.enter_context(upstreams(None, directory, authority))
        names = ("child", "in_process", "none")
        targets = [stack.enter_context(proxy(name, directory / name, bootstrap)) for name in names]
        for target in targets:
            uvloop.run(load(target, ports["http"], None, 16, options.seconds))  # topics are made, caches warm
        for number in range(options.rounds):
            for target in targets:
                assert target.process is not None
                before, begin = target.cpu_seconds(), time.monotonic()
                latencies = uvloop.run(load(target, ports["http"], None, 16, options.seconds))
                cpu = (target.cpu_seconds() - before) / len(latencies) * 1e6
                figures = found.setdefault(target.name, {"rate": [], "cpu_us": [], "p99_ms": []})
                figures["rate"].append(len(latencies) / (time.monotonic() - begin))
                figures["cpu_us"].append(cpu)
                figures["p99_ms"].append(sorted(latencies)[int(len(latencies) * 0.99)] * 1000)
                say(f"round {number + 1}: {target.name} {figures['rate'][-1]:.0f}/s, {cpu:.0f} µs of CPU a request")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=60_000, help="records of a drain (default 60000)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round of requests (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, interleaved (default 5)")
    options = parser.parse_args()
    records = values(options.count)
    rates: dict[str, list[float]] = {"forwarder": [], "send": []}
    cpu: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder) / "kafka")
        node.start()
        try:
            for number in range(options.rounds):
                rate, spent = drained(Path(folder) / f"drain-{number}", records, node.bootstrap)
                rates["forwarder"].append(rate)
                cpu.append(spent)
                rates["send"].append(asyncio.run(sent(records, node.bootstrap)))
                say(
                    f"round {number + 1}: forwarder {rate:.0f}/s, {spent:.0f} µs of CPU; send {rates['send'][-1]:.0f}/s"
                )
            found = place(options, Path(folder), node.bootstrap)
        finally:
            node.kill()
    child, inside = found["child"], found["in_process"]
    figures = {
        "drain_per_s": round(median(rates["forwarder"])),
        "drain_cpu_us": round(median(cpu), 1),
        "send_ratio": ratio(rates["forwarder"], rates["send"]),
        "arrival_multiple": ratio(rates["forwarder"], child["rate"]),
        "in_process_rate_ratio": ratio(inside["rate"], child["rate"]),
        "in_process_cpu_ratio": ratio(inside["cpu_us"], child["cpu_us"]),
        "in_process_p99_ratio": ratio(inside["p99_ms"], child["p99_ms"]),
    }
    finish(
        "forwarder",
        figures,
        detail={"rates": rates, "cpu_us": cpu, "place": found, "options": json.loads(json.dumps(vars(options)))},
        packages=("aiokafka", "mitmproxy", "msgspec"),
    )


if __name__ == "__main__":
    main()
