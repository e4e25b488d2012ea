"""Proxied traffic while Kafka is stopped by SIGSTOP ÷ the same while it answers, in turns, of one proxy.

Paced clients send a few hundred requests a second; one Kafka node, the proxy, its forwarder, the load client and the
upstream share the machine, nothing is pinned. Before a calm round the forwarder has shipped what the outage left.
"""

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import trustme
import uvloop
from aiokafka import AIOKafkaConsumer
from scripts.kafka import Node

from benchmarks.capture import Client, Target, started, upstreams
from benchmarks.report import finish, ratio, say
from megido_shared.bus.topics import FLOWS

CLIENTS = 16
PAUSE = 0.05
"""Seconds between an answer and a client's next request."""
REQUEST = "GET http://localhost:{}/ HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench/1.0\r\nAccept: */*\r\n\r\n"


class Paced(Client):
    def begin(self) -> None:
        asyncio.get_running_loop().call_later(PAUSE, self._send)

    def _send(self) -> None:
        if self.running:
            super().begin()
        else:
            self.stop("")


async def load(port: int, upstream: int, seconds: float) -> list[float]:
    """Seconds that each answer took; fails on one that is none."""
    latencies: list[float] = []
    request = REQUEST.format(upstream).encode()
    loop = asyncio.get_running_loop()
    made = []
    for _ in range(CLIENTS):
        _, client = await loop.create_connection(lambda: Paced(request, latencies), "127.0.0.1", port)
        client.begin()
        made.append(client)
    await asyncio.sleep(seconds)
    for client in made:
        client.running = False
    await asyncio.wait_for(asyncio.gather(*(client.done for client in made)), 30)
    if failed := [client.failed for client in made if client.failed]:
        raise AssertionError(f"{len(failed)} clients were not served: {failed[0]}")
    return latencies


def memory_mb(target: Target) -> float:
    """The proxy's own, its forwarder left out."""
    assert target.process is not None
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{target.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@contextmanager
def frozen(node: Node) -> Iterator[None]:
    node.pause()
    try:
        yield
    finally:
        node.go_on()


@contextmanager
def proxy(directory: Path, bootstrap: str) -> Iterator[Target]:
    command = [sys.executable, "-m", "megido_capture", "--data-dir", str(directory), "--kafka", bootstrap]
    command += ["--listen-port", "0", "--metrics-port", "0", "--forwarder"]
    with started(command, None, subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = re.search(rb"proxy on \S+?:(\d+)\b.*metrics on \S+:(\d+)", process.stdout.readline())
        assert ready is not None, "megido capture did not start"
        yield Target("proxy", int(ready[1]), process, metrics_port=int(ready[2]))


async def until_shipped(metrics_port: int, bootstrap: str) -> float:
    """Until Kafka has as many flows as the proxy has recorded; the seconds."""
    began = time.monotonic()
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        captured = re.search(rb"^megido_capture_records_total (\S+)", answer.read(), re.M)
    assert captured is not None
    reader = AIOKafkaConsumer(FLOWS.name, bootstrap_servers=bootstrap)
    await reader.start()
    try:
        async with asyncio.timeout(120):
            while sum((await reader.end_offsets(reader.assignment())).values()) < float(captured[1]):
                await asyncio.sleep(0.05)
    finally:
        await reader.stop()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a round (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, interleaved (default 3)")
    options = parser.parse_args()
    p99: dict[str, list[float]] = {"calm": [], "frozen": []}
    median_ms: dict[str, list[float]] = {"calm": [], "frozen": []}
    memory: dict[str, list[float]] = {"calm": [], "frozen": []}
    with tempfile.TemporaryDirectory() as folder:
        node = Node(Path(folder) / "kafka")
        node.start()
        try:
            with (
                upstreams(None, Path(folder), trustme.CA()) as ports,
                proxy(Path(folder) / "data", node.bootstrap) as target,
            ):
                uvloop.run(load(target.port, ports["http"], min(options.seconds, 5.0)))  # topics are made, caches warm

                def measure(name: str) -> None:
                    latencies = uvloop.run(load(target.port, ports["http"], options.seconds))
                    cuts = quantiles(latencies, n=100)
                    p99[name].append(cuts[98] * 1000)
                    median_ms[name].append(cuts[49] * 1000)
                    memory[name].append(memory_mb(target))
                    say(
                        f"{name}: {len(latencies) / options.seconds:.0f}/s, p99 {p99[name][-1]:.1f} ms, "
                        f"median {median_ms[name][-1]:.1f} ms, {memory[name][-1]:.0f} MB"
                    )

                for _ in range(options.rounds):
                    measure("calm")
                    with frozen(node):
                        measure("frozen")
                    shipped = uvloop.run(until_shipped(target.metrics_port, node.bootstrap))
                    say(f"shipped after {shipped:.1f} s")
        finally:
            node.kill()
    figures = {
        "p99_ratio": ratio(p99["frozen"], p99["calm"]),
        "median_ratio": ratio(median_ms["frozen"], median_ms["calm"]),
        "extra_mb": round(max(frozen - calm for calm, frozen in zip(memory["calm"], memory["frozen"], strict=True)), 1),
    }
    detail = {
        "p99_ms": p99,
        "median_ms": median_ms,
        "memory_mb": memory,
        "options": vars(options),
    }
    finish("outage", figures, detail=detail, packages=("aiokafka", "mitmproxy", "msgspec"))


if __name__ == "__main__":
    main()
