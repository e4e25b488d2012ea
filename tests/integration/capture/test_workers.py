"""`megido capture --workers`: one port, one certificate authority, a node each, and nothing left when it ends."""

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from megido_shared.events import FlowCompleted, FlowInterrupted, NodeStatus
from tests.integration.capture.harness import Proxy, body, capture, curl, flows, read_events, run, start, until
from tests.integration.capture.upstream import PIECE, Upstream

pytestmark = pytest.mark.timeout(120)

MODULE = "megido_capture.workers.worker"


def workers(proxy: Proxy) -> list[int]:
    """The pids of the processes that serve for this one, by their number."""
    return children(proxy.process.pid, MODULE)


def children(parent: int, what: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if int(stat[1]) == parent and what in command and stat[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def has_let_go(pid: int) -> bool:
    """Whether a killed process has closed its sockets. Its first thread may be dead (Z) and the others not yet: the
    open files are everybody's, and are closed by the last."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()] == [str(pid)]
    except OSError:
        return True


def running(data_dir: Path) -> list[int]:
    """Every process that names this data directory, whoever its parent is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(data_dir).encode() in command:
                found.append(int(entry.name))
    return found


async def ops(proxy: Proxy, path: str) -> tuple[int, str]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.metrics_port}", trust_env=False) as client:
        answer = await client.get(path)
    return answer.status_code, answer.text


async def all_serve(proxy: Proxy) -> None:
    async def ready() -> tuple[int, str]:
        return await ops(proxy, "/readyz")

    await until(ready, lambda answer: answer[0] == 200)


async def gone(data_dir: Path) -> None:
    async def look() -> list[int]:
        return running(data_dir)

    await until(look, lambda found: not found)


async def get(port: int, upstream: Upstream, path: str, host: str = "127.0.0.1") -> bytes:
    """One request on a connection of its own; the whole answer."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        f"GET http://127.0.0.1:{upstream.port}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Proxy]:
    async with capture(tmp_path / "data", "--workers", "2") as proxy:
        yield proxy


async def test_workers_share_the_port_the_authority_and_the_endpoint(pair: Proxy, upstream_tls: Upstream) -> None:
    assert (await ops(pair, "/livez"))[0] == 200 and (await ops(pair, "/readyz"))[0] == 200
    url = f"https://127.0.0.1:{upstream_tls.port}/plain"
    # Connections are dealt out by their addresses: 40 at one of two workers happen once in 2**39.
    answers = await asyncio.gather(*[curl(pair, f"{url}/{number}") for number in range(40)])
    assert {answer.status for answer in answers} == {502}, "the upstream's certificate is not trusted, ours is"
    metrics = (await ops(pair, "/metrics"))[1]
    assert "megido_capture_workers 2.0" in metrics and "megido_capture_worker_restarts_total 0.0" in metrics
    for node in ("capture-0", "capture-1"):
        assert f'megido_capture_client_connections{{node="{node}"}}' in metrics
        assert f'megido_capture_events_total{{name="failed",node="{node}"}}' in metrics
    assert metrics.count("# TYPE megido_capture_events_total counter") == 1
    assert await asyncio.to_thread(pair.stop) == 0
    assert not running(pair.data_dir)
    found = await read_events(pair.data_dir)
    beats = [event for event in found if isinstance(event, NodeStatus)]
    assert {(beat.node, beat.state) for beat in beats} >= {
        (node, state) for node in ("capture-0", "capture-1") for state in ("started", "stopping")
    }
    assert {beat.listen for beat in beats if beat.state == "started"} == {f"127.0.0.1:{pair.port}"}
    assert len({beat.pid for beat in beats}) == 2


async def test_connections_are_dealt_to_all(pair: Proxy, upstream: Upstream) -> None:
    await asyncio.gather(*[get(pair.port, upstream, f"plain/{number}") for number in range(40)])
    found = await pair.until(lambda events: len(flows(events)) >= 40)
    assert set(Counter(flow.node for flow in flows(found))) == {"capture-0", "capture-1"}


@pytest.mark.parametrize("second", [("--workers", "2"), ()])
async def test_a_taken_port_is_refused(pair: Proxy, tmp_path: Path, second: tuple[str, ...]) -> None:
    """Also one that several processes share already."""
    place = ("--data-dir", str(tmp_path / "other"), "--listen-port", str(pair.port), "--metrics-port", "0")
    command = (sys.executable, "-m", "megido_capture", *place, *second)
    assert await run(*command) == (
        2,
        f"megido: the proxy cannot listen on 127.0.0.1:{pair.port} (address already in use); "
        "choose another with --listen-port\n",
    )


async def test_the_port_is_kept_while_no_worker_listens(pair: Proxy) -> None:
    for pid in workers(pair):
        os.kill(pid, signal.SIGKILL)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", pair.port))
            stranger.listen()
    await all_serve(pair)


async def test_a_killed_worker_comes_back_as_the_same_node_while_the_other_serves(
    pair: Proxy, upstream: Upstream
) -> None:
    upstream.release.clear()
    streams = []
    for number in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.port)
        writer.write(b"GET http://127.0.0.1:%d/close/9000?%d HTTP/1.1\r\nHost: x\r\n\r\n" % (upstream.port, number))
        streams.append((reader, writer))
    for reader, _ in streams:
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        assert await asyncio.wait_for(reader.readexactly(len(PIECE)), 20) == PIECE
    before = workers(pair)
    os.kill(before[0], signal.SIGKILL)

    async def let_go() -> bool:
        return has_let_go(before[0])

    # Not when its command line is gone: a dying process gives up its memory first, its sockets later.
    await until(let_go, bool)

    async def replaced() -> list[int]:
        # The kernel deals only to those who listen; what had been dealt to the dead one was reset.
        answer = await get(pair.port, upstream, "plain/meanwhile")
        assert answer.endswith(b'{"answer": "meanwhile"}')
        return workers(pair)

    await until(replaced, lambda found: len(found) == 2 and before[0] not in found)
    await all_serve(pair)
    assert "megido_capture_worker_restarts_total 1.0" in (await ops(pair, "/metrics"))[1]
    found = await pair.until(lambda events: bool(flows(events, FlowInterrupted)))
    upstream.release.set()
    for _, writer in streams:
        writer.close()
    assert await asyncio.to_thread(pair.stop) == 0
    found = await read_events(pair.data_dir)
    assert {event.node for event in found} == {"capture-0", "capture-1"}, "no third slot"
    cut = flows(found, FlowInterrupted)
    assert len({flow.node for flow in cut}) == 1
    assert all(body(found, flow) == PIECE for flow in cut)
    ended = {flow.flow_id for flow in found if isinstance(flow, FlowCompleted | FlowInterrupted)}
    assert len(ended) == len([flow for flow in found if isinstance(flow, FlowCompleted | FlowInterrupted)])


async def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    proxy = await asyncio.to_thread(start, data_dir, "--workers", "2", "--forwarder", "--api-url", "http://127.0.0.1:1")
    assert len(workers(proxy)) == 2

    async def forwarders() -> list[int]:
        return children(proxy.process.pid, "megido_shared.bus.forwarder")

    await until(forwarders, lambda found: len(found) == 1)
    assert not any(children(pid, "forwarder") for pid in workers(proxy)), "one for the group"
    proxy.process.kill()
    await asyncio.to_thread(proxy.process.wait)
    await gone(data_dir)
    async with capture(data_dir, "--workers", "2") as again:
        assert len(workers(again)) == 2


async def test_ctrl_c_reaches_the_workers_through_their_parent(tmp_path: Path, upstream: Upstream) -> None:
    data_dir = tmp_path / "data"
    async with capture(data_dir, "--workers", "2") as proxy:
        for pid in workers(proxy):
            os.kill(pid, signal.SIGINT)  # which a terminal sends to every process
        assert (await get(proxy.port, upstream, "plain/on")).endswith(b'"on"}')
        assert len(workers(proxy)) == 2
        proxy.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(proxy.process.wait, 20) == 0
        assert not running(data_dir)
        assert not [line for line in proxy.output if "Traceback" in line]


async def test_limits_are_divided(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(
        tmp_path / "data", "--workers", "2", "--max-concurrent-clients", "5", "--journal-cap", "8MiB"
    ) as proxy:
        streams = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(40)]
        for _, writer in streams:
            writer.write(b"GET http://127.0.0.1:%d/hang HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)

        async def refused() -> Counter[str]:
            lines = (await ops(proxy, "/metrics"))[1].splitlines()
            counted = [line for line in lines if 'name="refused_clients_total"' in line]
            nodes = {line.partition('node="')[2].partition('"')[0]: line.rpartition(" ")[2] for line in counted}
            return Counter({node: int(float(number)) for node, number in nodes.items()})

        found = await until(refused, lambda found: found.total() == 40 - 6)
        assert set(found) == {"capture-0", "capture-1"}, "each takes half of five, rounded up"
        metrics = (await ops(proxy, "/metrics"))[1]
        assert 'megido_capture_journal_cap_bytes{node="capture-1"} 4.194304e+06' in metrics
        upstream.release.set()
        for _, writer in streams:
            writer.close()


async def test_several_listeners_and_ipv6(tmp_path: Path, upstream: Upstream) -> None:
    modes = ("--mode", "regular", "--mode", f"reverse:http://127.0.0.1:{upstream.port}@::1:0")
    async with capture(tmp_path / "data", "--workers", "2", *modes) as proxy:
        assert (await get(proxy.port, upstream, "plain/regular")).endswith(b'"regular"}')
        [line] = [line for line in proxy.output if "proxy on" in line]
        port = int(line.partition("::1:")[2].partition(",")[0])
        reader, writer = await asyncio.open_connection("::1", port)
        writer.write(b"GET /plain/reverse HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 20)).endswith(b'"reverse"}')
        writer.close()
        assert await asyncio.to_thread(proxy.stop) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--auth-required",), "auth_required is set but"),
        (("--mode", "dns"), "mode dns cannot be served by several workers; leave --workers out"),
        (("--mode", "sideways"), "none of mitmproxy's"),
        (("--set", "listen_port=1"), "--set listen_port does not go with --workers; use --listen-port"),
        (("--set", "no_such_option=1"), "no_such_option"),
    ],
)
async def test_what_cannot_work_is_one_line(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    place = ("--data-dir", str(tmp_path / "data"), "--listen-port", "0", "--metrics-port", "0")
    code, printed = await run(sys.executable, "-m", "megido_capture", *place, "--workers", "2", *arguments)
    assert code == 2 and says in printed, printed
    assert len([line for line in printed.splitlines() if line.startswith("megido: ")]) == 1
    assert not running(tmp_path / "data")


async def test_a_group_that_cannot_start_any_more_ends(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with capture(data_dir, "--workers", "2") as proxy:
        found = workers(proxy)
        await asyncio.to_thread(shutil.move, data_dir / "bus", tmp_path / "bus")
        (data_dir / "bus").write_bytes(b"")
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        assert await asyncio.to_thread(proxy.process.wait, 60) == 1
        assert "no worker can be started; the last one ended with the journal in" in "".join(proxy.output)
    assert not running(data_dir)
