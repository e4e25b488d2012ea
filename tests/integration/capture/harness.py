"""Starts a proxy as a user would, talks to it with curl, and reads the journal back as a consumer does."""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from megido_shared import events, ids
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import INGESTED
from megido_shared.datadir import DataDir

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 30.0


@dataclass
class Proxy:
    process: subprocess.Popen[bytes]
    data_dir: Path
    port: int
    metrics_port: int = 0
    output: list[str] = field(default_factory=list)
    since: bytes = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        return self.data_dir / "ca" / "mitmproxy-ca-cert.pem"

    def from_now(self) -> "Proxy":
        """The same proxy, for a test that is only about what happens from now on."""
        time.sleep(0.002)  # ids order events of different processes by the millisecond
        return replace(self, since=ids.floor_id(datetime.now(UTC)).bytes)  # this one is still to come

    async def events(self) -> list[Any]:
        """The events in the journal, heartbeats left out."""
        found = await read_events(self.data_dir)
        return [e for e in found if not isinstance(e, events.NodeStatus) and e.event_id > self.since]

    async def until(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        """The events as soon as they are `enough`."""
        return await until(self.events, enough)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


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
    proxy = await asyncio.to_thread(start, data_dir, *arguments, **env)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.stop)


def start(data_dir: Path, *arguments: str, port: int = 0, **env: str) -> Proxy:
    command = [sys.executable, "-m", "megido_capture", "--data-dir", str(data_dir), "--listen-port", str(port)]
    command += ["--metrics-port", "0", "--no-forwarder", *arguments]
    return _started(command, data_dir, re.compile(r"proxy on \S+?:(\d+)\b.*metrics on \S+:(\d+)"), env)


@contextlib.asynccontextmanager
async def mitm(tool: str, data_dir: Path, *options: str, **env: str) -> AsyncIterator[Proxy]:
    """`mitmdump -s services/capture/addon.py --set …`, or another of mitmproxy's tools."""
    command = [str(Path(sys.executable).parent / tool), "-s", str(ROOT / "services/capture/addon.py"), "-p", "0"]
    for option in (f"megido_data_dir={data_dir}", "megido_forwarder=false", *options):
        command += ["--set", option]
    if tool == "mitmweb":
        command += ["--no-web-open-browser", "--web-port", "0"]
    ready = re.compile(r"listening at 127\.0\.0\.1:(\d+)\.")
    proxy = await asyncio.to_thread(_started, command, data_dir, ready, env | {"PYTHONUNBUFFERED": "1"})
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.stop)


def _started(command: list[str], data_dir: Path, ready: re.Pattern[str], env: dict[str, str]) -> Proxy:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(**env),
        cwd=ROOT,
    )
    assert process.stdout is not None
    lines: list[str] = []
    threading.Thread(target=_collect, args=(process.stdout, lines), daemon=True).start()
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        for line in list(lines):
            if found := ready.search(line):
                return Proxy(process, data_dir, *(int(port) for port in found.groups()), output=lines)
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"not started (exit code {process.wait()}):\n{''.join(lines)}")


def _collect(stream: IO[bytes], lines: list[str]) -> None:
    for line in stream:
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
