"""Whether memory stays flat: over many flows, over a large body, over many messages of one WebSocket connection.

The proxy is `megido capture` with everything recorded; its journal is drained all the while by a consumer that counts
and stores nothing (`benchmarks/drain.py`), so that disk use stays bounded, and the counts are compared with the
clients'. Each run writes its figures and a picture. Memory does not depend on the machine's speed: the runs may share
it with other work.
"""

import argparse
import asyncio
import json
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
import uvloop

from benchmarks import body_load, websocket_load
from benchmarks.capture import HERE, Server, Target, connected, proxies
from benchmarks.chart import Chart, Line, write
from benchmarks.memory import MB, Watch
from benchmarks.report import RESULTS, finish, say

PACKAGES = ("mitmproxy", "h11", "h2", "wsproto", "msgspec")
CLIENTS = 8
"""Keep-alive connections, of each scheme."""
PEER_MESSAGES = 100_000
"""mitmproxy keeps every message, so the slope shows early."""
FREE = 4 << 30
"""Bytes that must be free where the journal is."""


@dataclass(frozen=True)
class Stage:
    """What every run needs: two running proxies, the site's ports by name, and the counting consumer."""

    directory: Path
    ours: Target
    bare: Target
    ports: dict[str, int]
    consumer: subprocess.Popen[bytes]

    def counted(self) -> dict[str, int]:
        """What was in the journal, once it is empty."""
        out, _ = self.consumer.communicate(timeout=300)
        counts: dict[str, int] = json.loads(out)
        lost = {name: number for name, number in counts.items() if name.startswith("gap:")}
        assert not lost, lost
        return counts


def flows(stage: Stage, arguments: argparse.Namespace) -> dict[str, object]:
    """Half of the flows over HTTP, half over HTTPS, at once."""
    watches = {}
    for target in (stage.ours, stage.bare):
        watches[target.name] = Watch(pid(target))
        uvloop.run(_flows(target, stage.ports, arguments.flows, watches[target.name]))
    counts = stage.counted()
    assert counts["FlowCompleted"] == stage.ours.requests, (counts, stage.ours.requests)
    ours, bare = watches["megido"], watches["mitmdump"]
    figures: dict[str, object] = {
        "flows": stage.ours.requests,
        "rss_slope_mb_per_10k": ours.slope_mb(10_000),
        "rss_slope_mb_per_10k_mitmdump": bare.slope_mb(10_000),
    }
    write(
        RESULTS / "endurance-flows.svg",
        Chart(
            title="Memory over HTTP and HTTPS flows",
            subtitle=f"{CLIENTS} keep-alive clients of each scheme, 1 KiB of JSON; all flows of megido recorded",
            x="flows (thousands)",
            y="resident memory of the proxy (MB)",
            lines=[
                Line(f"megido: {ours.slope_mb(10_000):+.2f} MB per 10,000 flows", ours.points(1000)),
                Line(f"bare mitmdump: {bare.slope_mb(10_000):+.2f}, records nothing", bare.points(1000)),
            ],
        ),
    )
    finish("endurance-flows", figures, detail=_details(watches) | {"counted": counts}, packages=PACKAGES)
    return figures


async def _flows(target: Target, ports: dict[str, int], total: int, watch: Watch) -> None:
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    latencies: list[float] = []
    made = [await connected(target, ports["http"], None, latencies) for _ in range(CLIENTS)]
    made += [await connected(target, ports["https"], tls, latencies) for _ in range(CLIENTS)]
    for client in made:
        client.begin()
    said = 0
    while len(latencies) < total:
        failed = [client.failed for client in made if client.failed]
        assert not failed, f"{target.name}: {failed[0]}"
        watch.take(len(latencies))
        if len(latencies) - said >= total / 10:
            said = len(latencies)
            say(f"  {target.name}: {said:,} flows, {watch.samples[-1].rss / MB:.1f} MB")
        await asyncio.sleep(0.25)
    for client in made:
        client.running = False
    await asyncio.wait_for(asyncio.gather(*(client.done for client in made)), 60)
    watch.take(len(latencies))
    target.requests += len(latencies)


def body(stage: Stage, arguments: argparse.Namespace) -> dict[str, object]:
    """The same body down and up, each over HTTP/1.1 and over HTTP/2 with TLS."""
    size = arguments.body_mb * MB
    expected = body_load.hash_of(size)
    authority = stage.directory / "data" / "ca" / "mitmproxy-ca-cert.pem"
    sites = {"http1": f"http://localhost:{stage.ports['body']}", "h2": f"https://localhost:{stage.ports['body_tls']}"}
    watches: dict[str, Watch] = {}
    warm_up(stage.ours, authority, list(sites.values()))
    for version, site in sites.items():
        command = body_load.curl(
            stage.ours.port, authority, "http2" if version == "h2" else "http1.1", f"{site}/{size}"
        )
        for way in ("down", "up"):
            watch = watches[f"{way}_{version}"] = Watch(pid(stage.ours))
            watch.take(0)
            got = (
                body_load.download(command, watch.take)
                if way == "down"
                else body_load.upload(command, size, watch.take)
            )
            watch.take(size)
            assert got == expected, f"{way} over {version}: another body arrived"
            say(f"  {way} over {version}: {watch.extra_mb():+.1f} MB, {watch.samples[-1].seconds:.0f} s")
    counts = stage.counted()
    figures: dict[str, object] = {"body_mb": arguments.body_mb, "sha256_equal": True}
    figures |= {f"extra_mb_{name}": watch.extra_mb() for name, watch in watches.items()}
    assert counts["response bytes"] >= 2 * size and counts["request bytes"] >= 2 * size, counts
    names = {"http1": "HTTP/1.1", "h2": "HTTP/2"}
    write(
        RESULTS / "endurance-body.svg",
        Chart(
            title=f"Memory over a body of {arguments.body_mb:,} MB",
            subtitle="streamed through, hashed and counted whole; 1 MiB of each stored; same SHA-256 at the receiver",
            x="transferred (MB)",
            y="resident memory above that before (MB)",
            lines=[
                Line(
                    f"{way}, {names[version]}: {watch.extra_mb():+.1f} MB",
                    [(x, y - watch.points()[0][1]) for x, y in watch.points(MB)],
                )
                for (way, _, version), watch in ((name.partition("_"), watch) for name, watch in watches.items())
            ],
            reach=32,
        ),
    )
    finish("endurance-body", figures, detail=_details(watches) | {"counted": counts}, packages=PACKAGES)
    return figures


def warm_up(target: Target, authority: Path, sites: list[str]) -> None:
    """One small body each way: modules are loaded, certificates made."""
    for site, version in zip(sites, ("http1.1", "http2"), strict=True):
        command = body_load.curl(target.port, authority, version, f"{site}/{MB}")
        body_load.download(command, lambda _: None)
        body_load.upload(command, MB, lambda _: None)


def websocket(stage: Stage, arguments: argparse.Namespace) -> dict[str, object]:
    """Messages of 200 bytes and their echoes, on one connection."""
    watches: dict[str, Watch] = {}
    done: dict[str, int] = {}
    for target, messages in (
        (stage.ours, arguments.messages),
        (stage.bare, min(arguments.messages, PEER_MESSAGES)),
    ):
        watch = watches[target.name] = Watch(pid(target))
        done[target.name] = uvloop.run(_messages(target, stage.ports["echo"], messages, watch))
    counts = stage.counted()
    each_way = done["megido"] // 2
    assert counts["SEND TEXT"] == counts["RECEIVE TEXT"] == each_way and counts["SEND CLOSE"] == 1, counts
    ours, bare = watches["megido"], watches["mitmdump"]
    figures: dict[str, object] = {
        "websocket_messages": done["megido"],
        "websocket_slope_mb_per_100k": ours.slope_mb(100_000),
        "websocket_slope_mb_per_100k_mitmdump": bare.slope_mb(100_000),
    }
    write(
        RESULTS / "endurance-websocket.svg",
        Chart(
            title="Memory over the messages of one WebSocket connection",
            subtitle="200 bytes and their echo, both counted; all of megido's recorded",
            x="messages (thousands)",
            y="resident memory of the proxy (MB)",
            lines=[
                Line(f"megido: {ours.slope_mb(100_000):+.2f} MB per 100,000 messages", ours.points(1000)),
                Line(
                    f"bare mitmdump: {bare.slope_mb(100_000):+.1f}, stopped at {done['mitmdump']:,}", bare.points(1000)
                ),
            ],
        ),
    )
    finish("endurance-websocket", figures, detail=_details(watches) | {"counted": counts}, packages=PACKAGES)
    return figures


async def _messages(target: Target, echo: int, messages: int, watch: Watch) -> int:
    last = [0, 0]

    def progress(done: int) -> None:
        if done - last[0] >= messages / 1000:
            last[0] = done
            watch.take(done)
        if done - last[1] >= messages / 10:
            last[1] = done
            say(f"  {target.name}: {done:,} messages, {watch.samples[-1].rss / MB:.1f} MB")

    watch.take(0)
    return await websocket_load.converse(target.port, echo, messages, progress)


def pid(target: Target) -> int:
    assert target.process is not None
    return target.process.pid


def _details(watches: dict[str, Watch]) -> dict[str, object]:
    return {name: watch.detail() for name, watch in watches.items()}


RUNS = {"flows": flows, "body": body, "websocket": websocket}


@contextmanager
def staged() -> Iterator[Stage]:
    """Everything fresh, in a directory that is removed."""
    with tempfile.TemporaryDirectory(prefix="megido-endure-") as name:
        directory = Path(name)
        assert shutil.disk_usage(directory).free > FREE, f"less than {FREE >> 30} GB free at {directory}"
        authority = trustme.CA()
        trusted, certificate = directory / "upstream-ca.pem", directory / "server.pem"
        authority.cert_pem.write_to_path(str(trusted))
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(certificate))
        with (
            child("benchmarks.endurance", "--serve", str(certificate)) as site,
            proxies(None, directory, str(trusted), []) as (ours, bare),
            child("benchmarks.drain", str(directory / "data")) as consumer,
        ):
            assert site.stdout is not None
            yield Stage(directory, ours, bare, json.loads(site.stdout.readline()), consumer)


@contextmanager
def child(module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=HERE)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


async def serve(certificate: str) -> None:
    """The site, in a process of its own; prints its ports."""
    tls, with_h2 = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (tls, with_h2):
        context.load_cert_chain(certificate)
    with_h2.set_alpn_protocols(["h2", "http/1.1"])
    loop = asyncio.get_running_loop()
    servers = {
        "http": await loop.create_server(Server, "127.0.0.1", 0),
        "https": await loop.create_server(Server, "127.0.0.1", 0, ssl=tls),
        "echo": await loop.create_server(websocket_load.Echo, "127.0.0.1", 0),
        "body": await asyncio.start_server(body_load.serve, "127.0.0.1", 0),
        "body_tls": await asyncio.start_server(body_load.serve, "127.0.0.1", 0, ssl=with_h2),
    }
    print(json.dumps({name: server.sockets[0].getsockname()[1] for name, server in servers.items()}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--flows", type=int, default=200_000)
    parser.add_argument("--messages", type=int, default=1_000_000, help="of the connection, both ways together")
    parser.add_argument("--body-mb", type=int, default=1024)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the children and the directory go too
    figures: dict[str, object] = {}
    for name in arguments.only:
        say(name)
        with staged() as stage:
            figures |= RUNS[name](stage, arguments)
    if len(arguments.only) > 1:
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
