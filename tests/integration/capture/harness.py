"""Starts a proxy as a user would, talks to it with curl, and reads the journal back as a consumer does."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megido_shared import events, ids
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import INGESTED
from megido_shared.datadir import DataDir

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 30.0


@dataclass
class Proxy:
    process: asyncio.subprocess.Process
    data_dir: Path
    port: int
    metrics_port: int = 0
    output: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        return self.data_dir / "ca" / "mitmproxy-ca-cert.pem"

    async def events(self) -> list[Any]:
        """Every event in the journal, heartbeats left out."""
        return [event for event in await read_events(self.data_dir) if not isinstance(event, events.NodeStatus)]

    async def until(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        """The events as soon as they are `enough`."""
        return await until(self.events, enough)

    async def stop(self) -> int:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 20)


async def until[T](read: Callable[[], Any], enough: Callable[[T], bool]) -> T:
    deadline = time.monotonic() + DEADLINE
    while True:
        found: T = await read()
        if enough(found):
            return found
        assert time.monotonic() < deadline, f"not within {DEADLINE:.0f} s; last: {found!r}"
        await asyncio.sleep(0.05)


async def read_events(data_dir: Path) -> list[Any]:
    """All records of all nodes, decoded, topic by topic in order."""
    bus = LocalBus(DataDir(data_dir))
    consumer = await bus.consumer(f"test-{ids.to_text(ids.new_id())}", INGESTED)
    try:
        found: list[Any] = []
        while batch := await consumer.poll(timeout=0.0):
            assert not [gap for gap in batch.gaps if gap.kind == "corrupt"]
            found.extend(events.decode(record.value) for record in batch.records)
        return found
    finally:
        await consumer.close()


def body(all_events: list[Any], flow: Any, side: str = "response") -> bytes:
    """The stored part of a body: inline, or put together from its chunks."""
    message = flow.request if side == "request" else flow.response
    if not message.body.chunks:
        return bytes(message.body.data)
    chunks = {e.index: e.data for e in all_events if isinstance(e, events.BodyChunk) and _is_of(e, flow, side)}
    assert sorted(chunks) == list(range(message.body.chunks))
    return b"".join(chunks[index] for index in sorted(chunks))


def _is_of(chunk: events.BodyChunk, flow: Any, side: str) -> bool:
    return chunk.flow_id == flow.flow_id and chunk.side == side


def flows(found: list[Any], kind: type = events.FlowCompleted) -> list[Any]:
    return [event for event in found if isinstance(event, kind)]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROXY_", "MEGIDO_"))}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "no_proxy"):
        kept.pop(name, None)
    return kept | extra


@contextlib.asynccontextmanager
async def capture(data_dir: Path, *arguments: str, **env: str) -> AsyncIterator[Proxy]:
    """`megido capture` on free ports."""
    proxy = await start(data_dir, *arguments, **env)
    try:
        yield proxy
    finally:
        await proxy.stop()


async def start(data_dir: Path, *arguments: str, port: int = 0, **env: str) -> Proxy:
    command = [sys.executable, "-m", "megido_capture", "--data-dir", str(data_dir), "--listen-port", str(port)]
    command += ["--metrics-port", "0", "--no-forwarder", *arguments]
    return await _started(command, data_dir, re.compile(r"proxy on \S+?:(\d+)\b.*metrics on \S+:(\d+)"), env)


@contextlib.asynccontextmanager
async def mitm(tool: str, data_dir: Path, *options: str, **env: str) -> AsyncIterator[Proxy]:
    """`mitmdump -s services/capture/addon.py --set …`, or another of mitmproxy's tools."""
    command = [str(Path(sys.executable).parent / tool), "-s", str(ROOT / "services/capture/addon.py"), "-p", "0"]
    for option in (f"megido_data_dir={data_dir}", "megido_forwarder=false", *options):
        command += ["--set", option]
    if tool == "mitmweb":
        command += ["--no-web-open-browser", "--web-port", "0"]
    ready = re.compile(r"listening at 127\.0\.0\.1:(\d+)\.")
    proxy = await _started(command, data_dir, ready, env | {"PYTHONUNBUFFERED": "1"})
    try:
        yield proxy
    finally:
        await proxy.stop()


async def _started(command: list[str], data_dir: Path, ready: re.Pattern[str], env: dict[str, str]) -> Proxy:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(**env),
        cwd=ROOT,
    )
    assert process.stdout is not None
    lines: list[str] = []
    async with asyncio.timeout(DEADLINE):
        while line := (await process.stdout.readline()).decode(errors="replace"):
            lines.append(line)
            if found := ready.search(line):
                ports = [int(port) for port in found.groups()]
                proxy = Proxy(process, data_dir, *ports, output=lines)
                task = asyncio.create_task(_collect(process.stdout, lines))
                _COLLECTORS.add(task)
                task.add_done_callback(_COLLECTORS.discard)
                return proxy
    raise AssertionError(f"not started (exit code {await process.wait()}):\n{''.join(lines)}")


_COLLECTORS: set[asyncio.Task[None]] = set()


async def _collect(stream: asyncio.StreamReader, lines: list[str]) -> None:
    while line := await stream.readline():
        lines.append(line.decode(errors="replace"))


async def run(*command: str, **env: str) -> tuple[int, str]:
    """Exit code and everything that a command printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(**env),
        cwd=ROOT,
    )
    try:
        printed, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, printed.decode(errors="replace")


@dataclass
class Answer:
    code: int
    """curl's exit code."""
    status: int
    """0 without an answer; for a refused CONNECT the proxy's own status."""
    body: bytes


async def curl(proxy: Proxy, url: str, *arguments: str) -> Answer:
    """Real curl through the proxy, trusting its certificate authority."""
    command = ["curl", "-sS", "-m", "25", "-x", proxy.url, "--cacert", str(proxy.ca), *arguments]
    command += ["-o", "-", "-w", "%{stderr}\n%{http_code} %{http_connect}", url]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment()
    )
    out, err = await process.communicate()
    status, connect = err.decode().split("\n")[-1].split()
    return Answer(process.returncode or 0, int(status) or int(connect), out)
