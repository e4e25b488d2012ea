"""How many clients are served, how long a head may take, and that everybody else goes on meanwhile."""

import asyncio
import contextlib
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import NODES
from megido_shared.datadir import DataDir
from megido_shared.events import NodeStatus, decode
from tests.integration.capture.harness import Proxy, capture, curl, flows, run, until
from tests.integration.capture.upstream import Upstream
from tests.support.raw_server import RawServer, Talk

pytestmark = pytest.mark.timeout(90)

type Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def connected(
    proxy: Proxy, count: int, first: bytes = b"", **how: tuple[str, int]
) -> AsyncIterator[list[Streams]]:
    """That many connections, of which each has sent `first`."""
    made = [await asyncio.open_connection("127.0.0.1", proxy.port, **how) for _ in range(count)]  # type: ignore[arg-type]
    for _, writer in made:
        writer.write(first)
    try:
        yield made
    finally:
        for _, writer in made:
            writer.close()


async def closed(reader: asyncio.StreamReader, seconds: float = 20) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), seconds) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def get(upstream: Upstream, path: str) -> bytes:
    return f"GET http://127.0.0.1:{upstream.port}/{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def url(upstream: Upstream, path: str = "plain/1", scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{upstream.port}/{path}"


async def busy(upstream: Upstream, count: int) -> None:
    async def seen() -> int:
        return sum(b" /hang" in head for head in upstream.seen)

    await until(seen, lambda found: found == count)


async def counted(proxy: Proxy, name: str) -> int:
    page = await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{proxy.metrics_port}/metrics")
    for line in page.read().decode().splitlines():
        if line.startswith(f'megido_capture_events_total{{name="{name}"}}'):
            return int(float(line.rpartition(" ")[2]))
    return 0


async def in_heartbeat(proxy: Proxy) -> dict[str, int]:
    consumer = await LocalBus(DataDir(proxy.data_dir)).consumer(f"test-{time.monotonic_ns()}", [NODES])
    found: dict[str, int] = {}
    while batch := await consumer.poll(timeout=0.0):
        for record in batch.records:
            event = decode(record.value)
            if isinstance(event, NodeStatus):
                found = dict(event.counters)
    await consumer.close()
    return found


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_over_the_total_503_says_why(tmp_path: Path, upstream: Upstream, scheme: str) -> None:
    upstream.release.clear()
    async with capture(tmp_path, "--max-concurrent-clients", "3") as proxy, connected(proxy, 3, get(upstream, "hang")):
        await busy(upstream, 3)
        answer = await curl(proxy, url(upstream, scheme=scheme))
        assert answer.status == 503
        if scheme == "http":
            assert answer.code == 0 and b"max_concurrent_clients" in answer.body
        assert await counted(proxy, "refused_clients_total") == 1
        upstream.release.set()  # the three end, and their places are free
        await until(lambda: curl(proxy, url(upstream)), lambda found: found.status == 200)
        await until(lambda: in_heartbeat(proxy), lambda found: found.get("refused_clients_total", 0) >= 1)


async def test_one_address_over_its_limit_leaves_the_others_alone(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    async with (
        capture(tmp_path, "--max-clients-per-address", "2") as proxy,
        connected(proxy, 2, get(upstream, "hang"), local_addr=("127.0.0.2", 0)),
    ):
        await busy(upstream, 2)
        answer = await curl(proxy, url(upstream), "--interface", "127.0.0.2")
        assert answer.status == 503 and b"127.0.0.2" in answer.body and b"max_clients_per_address" in answer.body
        assert (await curl(proxy, url(upstream))).status == 200
        assert await counted(proxy, "refused_clients_address") == 1


async def test_idle_connections_give_way_and_websockets_do_not(tmp_path: Path, upstream: Upstream) -> None:
    async def switching(talk: Talk) -> None:
        await talk.head()
        await talk.say(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        await talk.rest()

    async with (
        RawServer(switching) as ws,
        capture(tmp_path, "--max-concurrent-clients", "4") as proxy,
        connected(
            proxy,
            1,
            b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n" % ws.port,
        ) as [(ws_reader, _)],
        connected(proxy, 3) as idle,
    ):
        await ws_reader.readuntil(b"\r\n\r\n")
        for reader, writer in idle:
            writer.write(get(upstream, "plain/1"))
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b'{"answer": "1"}'))
        # Refused until they are idle, then served in the place of the first of them.
        await until(lambda: curl(proxy, url(upstream)), lambda found: found.status == 200)
        assert await closed(idle[0][0])
        assert await counted(proxy, "evicted_clients") == 1
        assert not await closed(ws_reader, 0.1) and not await closed(idle[2][0], 0.1)


async def test_five_hundred_idle_connections_harm_nobody(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(tmp_path, "--max-concurrent-clients", "100") as proxy:
        await until(lambda: curl(proxy, url(upstream)), lambda found: found.status == 200)
        async with connected(proxy, 500):
            await until(lambda: curl(proxy, url(upstream)), lambda found: found.status == 200)
            for number in range(20):
                assert (await curl(proxy, url(upstream, f"plain/{number}"))).status == 200
            assert len(flows(await proxy.events())) == 22


async def test_slow_heads_are_ended_and_idle_connections_are_not(tmp_path: Path, upstream: Upstream) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not await closed(reader, 0.1):
                writer.write(b"a")
        return time.monotonic() - began

    start_of = get(upstream, "never")[:-2] + b"X-Slow: "
    async with (
        capture(tmp_path, "--header-timeout", "2") as proxy,
        connected(proxy, 1, get(upstream, "plain/1")) as [(reader, writer)],
    ):
        await reader.readuntil(b'"answer": "1"}')
        async with (
            connected(proxy, 20, start_of) as slow,
            connected(proxy, 5) as silent,
            connected(proxy, 1, get(upstream, "plain/2")) as [second],
        ):
            # One that had a whole head before: its second is slow.
            await second[0].readuntil(b'"answer": "2"}')
            second[1].write(start_of)
            ending = [asyncio.create_task(trickle(*streams)) for streams in (*slow, *silent, second)]
            served = 0
            while not all(task.done() for task in ending):
                assert (await curl(proxy, url(upstream))).status == 200
                served += 1
            lasted = [task.result() for task in ending]
        assert served > 3 and min(lasted) > 1.5 and max(lasted) < 6
        assert await counted(proxy, "header_timeouts") == 26
        writer.write(get(upstream, "plain/3"))
        assert b'"answer": "3"}' in await reader.readuntil(b'"answer": "3"}')


async def test_a_slow_body_is_no_slow_head(tmp_path: Path, upstream: Upstream) -> None:
    post = f"POST {url(upstream, 'count')} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n1".encode()
    async with (
        capture(tmp_path, "--header-timeout", "1") as proxy,
        connected(proxy, 1, post) as [(reader, writer)],
        connected(proxy, 1) as [(silent, _)],
    ):
        assert await closed(silent)  # so the deadline is over for the other too
        writer.write(b"2")
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")


async def test_open_files_are_raised_to_the_hard_limit(tmp_path: Path) -> None:
    async with capture(tmp_path) as proxy:
        limits = Path(f"/proc/{proxy.process.pid}/limits").read_text()
        soft, hard = limits.partition("Max open files")[2].split()[:2]
        assert soft == hard
    script = "import sys; from megido_capture.limits.openfiles import raise_open_files as r; r(int(sys.argv[1]))"
    for clients, warned in (("2000", True), ("10", False)):
        command = f"ulimit -Sn 200; ulimit -Hn 300; exec {sys.executable} -c '{script}' {clients}"
        code, printed = await run("bash", "-c", command)
        assert code == 0 and ("300 open files are allowed, too few" in printed) == warned, printed


@pytest.mark.parametrize("option", ["--max-concurrent-clients", "--max-clients-per-address", "--header-timeout"])
async def test_a_limit_below_nothing_is_refused(tmp_path: Path, option: str) -> None:
    code, printed = await run(
        sys.executable, "-m", "megido_capture", "--data-dir", str(tmp_path), "--listen-port", "0", f"{option}=-1"
    )
    assert code == 2 and option.strip("-").replace("-", "_") in printed and "Traceback" not in printed
