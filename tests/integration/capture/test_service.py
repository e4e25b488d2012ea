"""The service around the hooks: readiness, metrics, heartbeat, rules from the bus, and a start after a kill."""

import asyncio
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from megido_shared import ids
from megido_shared.bus.local import Journal, LocalBus
from megido_shared.config import PayloadRule, Snapshot, encode_snapshot
from megido_shared.datadir import DataDir
from megido_shared.events import BodyChunk, FlowInterrupted, FlowStarted, NodeStatus
from megido_shared.testing import a_request
from tests.integration.capture.harness import Proxy, body, capture, curl, flows, read_events, start, until
from tests.integration.capture.upstream import PIECE, Upstream


async def test_operations_endpoints(proxy: Proxy, upstream: Upstream) -> None:
    await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.metrics_port}", trust_env=False) as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert (
        'megido_capture_events_total{name="completed"}' in metrics
        and 'megido_capture_dropped_total{reason="cap"} 0' in metrics
    )
    assert "megido_capture_config_version 0.0" in metrics and "megido_capture_config_refused 0.0" in metrics


async def test_heartbeat_counts(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(tmp_path / "data") as proxy:
        await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")
        assert await asyncio.to_thread(proxy.stop) == 0
    beats = [event for event in await read_events(tmp_path / "data") if isinstance(event, NodeStatus)]
    assert (beats[0].state, beats[-1].state) == ("started", "stopping")
    assert beats[0].listen == f"127.0.0.1:{proxy.port}" and beats[0].pid == proxy.process.pid
    assert beats[-1].captured == 1 and beats[-1].counters["completed"] == 1 and beats[-1].counters["dropped"] == 0


async def test_rules_from_the_bus_apply_and_are_recorded_as_sent(tmp_path: Path, upstream: Upstream) -> None:
    bus = LocalBus(DataDir(tmp_path / "data"))
    async with capture(tmp_path / "data", "--source-app", "scanner") as proxy:
        rules = (
            rule(1, "header", "X-One", "1"),
            rule(2, "body", "extra", "2"),
            rule(3, "header", "X", "x", pattern="("),
        )
        await bus.put_config("global", encode_snapshot(Snapshot(scope="global", version=4, rules=rules)))
        scoped = Snapshot(scope="app:scanner", version=2, rules=(rule(4, "cookie", "session", "4"),))
        await bus.put_config("app:scanner", encode_snapshot(scoped))

        async def post() -> bytes:
            url = f"http://127.0.0.1:{upstream.port}/echo"
            return (await curl(proxy, url, "-H", "Content-Type: application/json", "-d", '{"a": 1}')).body

        head = await until(post, lambda found: b"X-One: 1" in found and b"session=4" in found)
        assert b'{"a": 1,"extra":"2"}' in head
        flow = flows(await proxy.events())[-1]
        assert flow.request.body.data == b'{"a": 1,"extra":"2"}' and set(flow.rules) == {1, 2, 4}
        assert await asyncio.to_thread(proxy.stop) == 0
    status = [event for event in await read_events(tmp_path / "data") if isinstance(event, NodeStatus)][-1]
    assert status.config_version == 4 and status.counters["rule_hits:1"] >= 1 and status.counters["rule_errors:3"] >= 1


def rule(number: int, kind: Any, point: str, payload: str, pattern: str = "/echo") -> PayloadRule:
    return PayloadRule(
        id=number,
        name=f"rule {number}",
        target_url_pattern=pattern,
        injection_type=kind,
        injection_point=point,
        payload_content=payload,
    )


async def test_what_a_kill_cut_off_is_interrupted_with_all_its_bytes(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    data_dir = tmp_path / "data"
    first = await asyncio.to_thread(start, data_dir)
    reader, writer = await asyncio.open_connection("127.0.0.1", first.port)
    writer.write(b"GET http://127.0.0.1:%d/close/9000 HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert b"200" in head and await asyncio.wait_for(reader.readexactly(len(PIECE)), 10) == PIECE
    first.process.send_signal(signal.SIGKILL)
    await asyncio.to_thread(first.process.wait)
    writer.close()
    for _ in range(2):  # the second start must not interrupt it again
        async with capture(data_dir) as proxy:
            found = await proxy.until(lambda events: bool(flows(events, FlowInterrupted)))
            await asyncio.to_thread(proxy.stop)
            found = await proxy.events()
    [interrupted], [started] = flows(found, FlowInterrupted), flows(found, FlowStarted)
    assert interrupted.flow_id == started.flow_id and interrupted.seq > 0
    assert body(found, interrupted) == PIECE and interrupted.response.body.sha256 == sha256(PIECE).digest()
    assert interrupted.response.body.size == len(PIECE) and interrupted.response.status == 200


async def test_a_stop_right_after_the_start_waits_for_what_the_last_life_left_open(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    journal = Journal.open(data_dir, "capture")
    stamp: dict[str, Any] = {"event_id": ids.new_id(), "node": journal.node, "epoch": journal.epoch, "time_us": 1}
    left_open = FlowStarted(**stamp, flow_id=ids.new_id(), request=a_request())
    journal.publish(left_open)
    another = BodyChunk(**stamp, flow_id=ids.new_id(), side="response", index=0, data=b"")
    for _ in range(20_000):  # it is still being read when the stop comes
        journal.publish(another)
    journal.close()
    proxy = await asyncio.to_thread(start, data_dir.root)
    assert await asyncio.to_thread(proxy.stop) == 0
    [interrupted] = flows(await read_events(data_dir.root), FlowInterrupted)
    assert interrupted.flow_id == left_open.flow_id


async def test_stop_drains_and_interrupts_what_will_not_end(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    async with capture(tmp_path / "data") as proxy:
        pending = asyncio.create_task(curl(proxy, f"http://127.0.0.1:{upstream.port}/hang"))
        await proxy.until(lambda events: bool(flows(events, FlowStarted)))
        assert await asyncio.to_thread(proxy.stop) == 0
        await pending
        found = await proxy.events()
    assert len(flows(found, FlowInterrupted)) == 1 and not flows(found)


async def test_forwarder_lives_and_dies_with_the_node(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with capture(data_dir, "--forwarder", "--api-url", "http://127.0.0.1:1") as proxy:
        [child] = await until(_forwarders(data_dir), lambda found: len(found) == 1)
        proxy.process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(proxy.process.wait)
        await until(_forwarders(data_dir), lambda found: child not in found)
    async with capture(data_dir, "--forwarder", "--api-url", "http://127.0.0.1:1") as proxy:
        await until(_forwarders(data_dir), lambda found: len(found) == 1)
        assert await asyncio.to_thread(proxy.stop) == 0
    assert await _forwarders(data_dir)() == []


def _forwarders(data_dir: Path):  # type: ignore[no-untyped-def]
    async def find() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if b"megido_shared.bus.forwarder" in command and str(data_dir).encode() in command:
                    found.append(int(entry.name))
        return found

    return find
