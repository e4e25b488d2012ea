"""`megido capture`, everything recorded in its journal, against bare `mitmdump`, which records nothing.

Both proxies run the whole time, pinned to one core; load client and upstream share the other. Rounds alternate
A B A B; a figure is the ratio of the medians. The client's rate without a proxy shows that it is not the limit.
`benchmarks.capture_more` compares Megido with itself: without capture, with two workers, over many flows.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import cast

import trustme
import uvloop

from benchmarks.report import finish, ratio, say

PACKAGES = ("mitmproxy", "h11", "h2", "msgspec", "uvloop")
BODY = json.dumps({"payload": "x" * 1009}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
HEADERS = "User-Agent: bench/1.0\r\nAccept: */*\r\nAccept-Encoding: gzip\r\n\r\n"
PARTS = ("mitmdump", "lean", "memory", "workers")
ALL_CORES = os.sched_getaffinity(0)
HERE = Path(__file__).resolve().parents[1]


class Server(asyncio.Protocol):
    """Answers every head that it gets; requests have no bodies."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        *heads, self.rest = (self.rest + data).split(b"\r\n\r\n")
        if heads:
            self.transport.write(ANSWER * len(heads))


class Client(asyncio.Protocol):
    """One keep-alive connection: the next request when the answer to the last one is whole."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self.request = request
        self.latencies = latencies
        self.rest = b""
        self.size = 0
        self.running = True
        self.failed: str = ""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def begin(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        if not self.size:
            end = self.rest.find(b"\r\n\r\n")
            if end < 0:
                return None
            found = re.search(rb"(?i)content-length: (\d+)", self.rest[:end])
            if not self.rest.startswith(b"HTTP/1.1 200") or found is None:
                return self.stop(f"unexpected answer: {self.rest[:200]!r}")
            self.size = end + 4 + int(found[1])
        if len(self.rest) < self.size:
            return None
        now = time.perf_counter()
        self.latencies.append(now - self.sent)
        self.rest = self.rest[self.size :]
        self.size = 0
        if self.running:
            self.begin()
        else:
            self.stop("")
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop("" if self.done.done() else f"connection lost: {exc}")

    def stop(self, failed: str) -> None:
        self.failed = self.failed or failed
        if not self.done.done():
            self.done.set_result(None)
        self.transport.close()


@dataclass
class Target:
    """A proxy, or none: then the upstream itself. `latencies` is by (scheme, clients), a list a round."""

    name: str
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    metrics_port: int = 0
    rates: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    p99_ms: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    cpu_ms: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    requests: int = 0

    def cpu_seconds(self) -> float:
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def connected(target: Target, upstream: int, tls: ssl.SSLContext | None, latencies: list[float]) -> Client:
    loop = asyncio.get_running_loop()
    port = target.port or upstream
    direct = tls is not None or not target.port
    path = "/data?id=1" if direct else f"http://localhost:{upstream}/data?id=1"
    request = f"GET {path} HTTP/1.1\r\nHost: localhost:{upstream}\r\n{HEADERS}".encode()
    if tls is None or not target.port:
        arguments = {"ssl": tls, "server_hostname": "localhost"} if tls is not None else {}
        _, client = await loop.create_connection(lambda: Client(request, latencies), "127.0.0.1", port, **arguments)
        return client
    raw = socket.socket()
    raw.setblocking(False)
    await loop.sock_connect(raw, ("127.0.0.1", port))
    await loop.sock_sendall(raw, f"CONNECT localhost:{upstream} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = await loop.sock_recv(raw, 4096)
        assert piece, f"CONNECT refused: {head!r}"
        head += piece
    assert b" 200 " in head, head
    _, client = await loop.create_connection(
        lambda: Client(request, latencies), sock=raw, ssl=tls, server_hostname="localhost"
    )
    return client


async def load(target: Target, upstream: int, tls: ssl.SSLContext | None, clients: int, seconds: float) -> list[float]:
    """Latencies of the answers that came within `seconds`."""
    latencies: list[float] = []
    made = [await connected(target, upstream, tls, latencies) for _ in range(clients)]
    for client in made:
        client.begin()
    await asyncio.sleep(seconds)
    counted = len(latencies)
    for client in made:
        client.running = False
    await asyncio.wait_for(asyncio.gather(*(client.done for client in made)), 30)
    failed = [client.failed for client in made if client.failed]
    assert not failed, f"{target.name}: {failed[0]}"
    target.requests += len(latencies)
    return latencies[:counted]


def measure(target: Target, key: tuple[str, int], ports: dict[str, int], tls: ssl.SSLContext, seconds: float) -> None:
    scheme, clients = key
    before = target.cpu_seconds()
    context = tls if scheme == "https" else None
    latencies = uvloop.run(load(target, ports[scheme], context, clients, seconds))
    rate = len(latencies) / seconds
    target.rates.setdefault(key, []).append(rate)
    target.p99_ms.setdefault(key, []).append(quantiles(latencies, n=100)[98] * 1000)
    if target.process is not None:
        target.cpu_ms.setdefault(key, []).append((target.cpu_seconds() - before) / len(latencies) * 1000)
    say(f"  {scheme} c{clients} {target.name}: {rate:.0f}/s, p99 {target.p99_ms[key][-1]:.1f} ms")


@contextlib.contextmanager
def upstreams(core: int | None, directory: Path, authority: trustme.CA) -> Iterator[dict[str, int]]:
    """Child process: an HTTP and an HTTPS server on free ports."""
    certificate = directory / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.capture", "--serve", str(certificate)], stdout=subprocess.PIPE, cwd=HERE
    )
    assert child.stdout is not None
    pin(child.pid, core)
    try:
        yield json.loads(child.stdout.readline())
    finally:
        child.terminate()
        child.wait()


async def serve(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    plain = await loop.create_server(Server, "127.0.0.1", 0)
    secure = await loop.create_server(Server, "127.0.0.1", 0, ssl=context)
    ports = {"http": plain.sockets[0].getsockname()[1], "https": secure.sockets[0].getsockname()[1]}
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def proxies(core: int | None, directory: Path, trusted: str, extra: list[str]) -> Iterator[tuple[Target, Target]]:
    """Full capture, and bare mitmdump; both verify the upstream's certificate."""
    verify = ["--set", f"ssl_verify_upstream_trusted_ca={trusted}"]
    port = free_port()
    bare = [str(Path(sys.executable).parent / "mitmdump"), "-q", "--set", "flow_detail=0", "--listen-host", "127.0.0.1"]
    bare += ["-p", str(port), "--set", f"confdir={directory / 'bare'}", *verify]
    ours = [sys.executable, "-m", "megido_capture", "--data-dir", str(directory / "data"), "--listen-port", "0"]
    ours += ["--metrics-port", "0", "--no-forwarder", *verify, *extra]
    with contextlib.ExitStack() as stack:
        captured = stack.enter_context(started(ours, core, subprocess.PIPE))
        assert captured.stdout is not None
        ready = re.search(rb"proxy on \S+?:(\d+)\b.*metrics on \S+:(\d+)", captured.stdout.readline())
        assert ready is not None, "megido capture did not start"
        mitmdump = stack.enter_context(started(bare, core, None))
        wait_for(port)
        yield (
            Target("megido", int(ready[1]), captured, metrics_port=int(ready[2])),
            Target("mitmdump", port, mitmdump),
        )


@contextlib.contextmanager
def started(command: list[str], core: int | None, stdout: int | None) -> Iterator[subprocess.Popen[bytes]]:
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    process = subprocess.Popen(command, stdout=stdout, env=environment, cwd=HERE)
    pin(process.pid, core)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(pid: int, core: int | None) -> None:
    """With all threads that it has and will have; nothing where there is one core only."""
    if core is not None:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})


def recorded(target: Target) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{target.metrics_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^megido_capture_(records|dropped)_total(?:\{\S+\})? ([\d.e+]+)$", text, re.MULTILINE)
    return {name: sum(float(value) for key, value in found if key == name) for name in ("records", "dropped")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each proxy")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--flows", type=int, default=200_000, help="flows over which memory is watched")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="two rounds of a second, 20,000 flows")
    parser.add_argument("--capture-arguments", nargs="*", default=[], help="passed on to megido capture")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve))
        return
    if arguments.quick:
        arguments.seconds, arguments.rounds, arguments.flows = 1.0, 2, 20_000
    cores = sorted(os.sched_getaffinity(0))
    proxy_core, load_core = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    pin(os.getpid(), load_core)
    with tempfile.TemporaryDirectory(prefix="megido-bench-") as name:
        run(arguments, Path(name), proxy_core, load_core)


def run(arguments: argparse.Namespace, directory: Path, proxy_core: int | None, load_core: int | None) -> None:
    from benchmarks import capture_more  # noqa: PLC0415 - it builds on this module

    authority = trustme.CA()
    trusted = directory / "upstream-ca.pem"
    authority.cert_pem.write_to_path(str(trusted))
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    figures: dict[str, object] = {}
    detail: dict[str, object] = {"seconds": arguments.seconds, "rounds": arguments.rounds}
    with upstreams(load_core, directory, authority) as ports:
        site = capture_more.Site(directory, trusted, ports, tls)
        parts = {
            "mitmdump": lambda: against_mitmdump(arguments, directory, trusted, ports, tls, proxy_core),
            "lean": lambda: capture_more.against_lean(arguments, site, proxy_core),
            "memory": lambda: capture_more.memory(arguments, site, proxy_core),
        }
        for name in (name for name in parts if name in arguments.only):
            found, more = parts[name]()
            figures |= found
            detail |= more
    if "workers" in arguments.only:
        if load_core is not None:
            os.sched_setaffinity(0, ALL_CORES)
        with upstreams(None, directory, authority) as ports:
            found, more = capture_more.two_workers(arguments, capture_more.Site(directory, trusted, ports, tls))
        figures |= found
        detail |= more
    finish("capture", figures, detail=detail, packages=PACKAGES)


def against_mitmdump(
    arguments: argparse.Namespace,
    directory: Path,
    trusted: Path,
    ports: dict[str, int],
    tls: ssl.SSLContext,
    core: int | None,
) -> tuple[dict[str, object], dict[str, object]]:
    keys = [(scheme, clients) for scheme in ("http", "https") for clients in arguments.clients]
    with proxies(core, directory, str(trusted), arguments.capture_arguments) as (ours, bare):
        direct = Target("direct")
        for key in keys:
            say(f"{key[0]} with {key[1]} clients")
            measure(direct, key, ports, tls, min(arguments.seconds, 2.0))
            for target in (ours, bare):
                uvloop.run(load(target, ports[key[0]], tls if key[0] == "https" else None, key[1], 1.0))
            for number in range(arguments.rounds):
                for target in (ours, bare) if number % 2 == 0 else (bare, ours):
                    measure(target, key, ports, tls, arguments.seconds)
        journal = recorded(ours)
    assert journal["dropped"] == 0 and journal["records"] == ours.requests, (journal, ours.requests)
    return report(keys, ours, bare, direct)


def report(
    keys: list[tuple[str, int]], ours: Target, bare: Target, direct: Target
) -> tuple[dict[str, object], dict[str, object]]:
    figures: dict[str, object] = {f"{s}_c{c}": ratio(ours.rates[s, c], bare.rates[s, c]) for s, c in keys}
    figures |= {f"{s}_p99_c{c}": ratio(ours.p99_ms[s, c], bare.p99_ms[s, c]) for s, c in keys}
    if ("https", 16) in keys:
        figures["p99_c16"] = figures["https_p99_c16"]
    detail: dict[str, object] = {
        "requests_recorded": ours.requests,
        "requests_per_second": {
            f"{s}_c{c}": {t.name: [round(rate) for rate in t.rates[s, c]] for t in (ours, bare, direct)}
            for s, c in keys
        },
        "p99_ms": {f"{s}_c{c}": {t.name: round(median(t.p99_ms[s, c]), 1) for t in (ours, bare)} for s, c in keys},
        "cpu_ms_per_request": {
            f"{s}_c{c}": {t.name: round(median(t.cpu_ms[s, c]), 3) for t in (ours, bare)} for s, c in keys
        },
        "cpu_ratio": {f"{s}_c{c}": ratio(ours.cpu_ms[s, c], bare.cpu_ms[s, c]) for s, c in keys},
    }
    return figures, detail


if __name__ == "__main__":
    main()
