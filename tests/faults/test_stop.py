"""A stop of which every part is slow at once: flows that do not end, a WebSocket that answers no CLOSE, a client that
does not read, a journal to recover, and a Kafka that is frozen. It keeps its budget, and the next start loses nothing.
"""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from scripts.kafka import Node

from megido_capture.stopping import LAST_RESORT
from megido_shared import events, ids
from megido_shared.events import FlowCompleted, FlowFailed, FlowInterrupted, FlowStarted
from megido_shared.testing import a_request
from tests.faults.balance import accounts_of_events, settle
from tests.faults.line import arrived, until_topic
from tests.integration.capture.harness import Proxy, capture, flows
from tests.integration.capture.test_drain import ask, head, refuses
from tests.integration.capture.test_websocket import echoing
from tests.integration.capture.test_workers import gone
from tests.integration.capture.upstream import PIECE, Upstream, serving
from tests.integration.ingest.process import journal_of
from tests.integration.ingest.traffic import an_event

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

LEFT_OPEN = 3_000
"""Flows of an earlier life, which the recovery is to tell."""
STOPPED = re.compile(r"stopped in ([\d.]+) of ([\d.]+) s \((.*)\)")

type Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _deaf(proxy: Proxy, port: int) -> Streams:
    """A WebSocket whose client never answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    fields = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    fields += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    writer.write(f"GET http://127.0.0.1:{port}/deaf HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
    assert b" 101 " in await head(reader)
    return reader, writer


async def _held(proxy: Proxy, upstream: Upstream, port: int) -> list[Streams]:
    """Everything that a stop would wait for."""
    streams = [await ask(proxy, upstream, f"close/9000?{number}") for number in range(6)]
    for reader, _ in streams:
        await head(reader)
        assert await asyncio.wait_for(reader.readexactly(len(PIECE)), 20) == PIECE
    unread = await ask(proxy, upstream, "length/20000000")
    assert b" 200 " in await head(unread[0])
    return [*streams, unread, await _deaf(proxy, port)]


def _kept_its_budget(proxy: Proxy, stops: int) -> None:
    said = "".join(proxy.output)
    assert "leaving it" not in said and "are killed" not in said and "Traceback" not in said, said
    found = STOPPED.findall(said)
    print(*(f"stopped in {used} of {seconds} s ({parts})" for used, seconds, parts in found), sep="\n")
    assert len(found) == stops, said
    for used, seconds, _ in found:
        assert float(used) <= float(seconds) + LAST_RESORT
    whole = [parts for _, _, parts in found if "drain" in parts]
    assert any(float(re.findall(r"drain ([\d.]+)", parts)[0]) > 3 for parts in whole), "nothing was slow"
    assert sum("forwarder" in parts for _, _, parts in found) == 1


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stop_whose_parts_are_all_slow(workers: int, tmp_path: Path, fresh_kafka: Node) -> None:
    data_dir, bootstrap = tmp_path / "data", fresh_kafka.bootstrap
    left = [an_event(FlowStarted, flow_id=ids.new_id(), request=a_request()) for _ in range(LEFT_OPEN)]
    shared = ("--kafka", bootstrap, "--forwarder")
    several = ("--workers", str(workers)) if workers > 1 else ()
    answered = [f"/plain/{number}" for number in range(20)]
    async with serving() as upstream, echoing() as port:
        upstream.release.clear()
        async with capture(data_dir, *shared, *several) as proxy:
            await until_topic(bootstrap)
            for target in answered:
                reader, writer = await ask(proxy, upstream, target[1:])
                assert b" 200 " in await head(reader)
                assert (await reader.readuntil(b"}")).endswith(b'"}')
                writer.close()
            assert await asyncio.to_thread(proxy.stop) == 0
            await gone(data_dir)
        await asyncio.to_thread(journal_of, data_dir, left)
        async with capture(data_dir, *shared, *several) as proxy:
            held = await _held(proxy, upstream, port)
            fresh_kafka.pause()
            proxy.process.send_signal(signal.SIGTERM)
            await refuses(proxy)
            # Within 15 s; a machine that is busy otherwise takes longer.
            assert await asyncio.to_thread(proxy.process.wait, 60) == 0
            await gone(data_dir)
            _kept_its_budget(proxy, 1 if workers == 1 else workers + 1)
            for _, writer in held:
                writer.close()
        fresh_kafka.go_on()
        async with capture(data_dir, *shared, *several):
            found = await _all_ended(bootstrap, answered, {event.flow_id for event in left})
    _nothing_is_lost(found, answered)


async def _all_ended(bootstrap: str, answered: list[str], left: set[bytes]) -> list[Any]:
    """What is on the topics, once every flow has its end there."""
    async with asyncio.timeout(120):
        while True:
            found = [events.decode(value) for _, _, value in await arrived(bootstrap, answered)]
            ended = {event.flow_id for event in _ends(found)}
            cut = [event for event in flows(found, FlowInterrupted) if event.request.target.startswith(b"/close/")]
            if left <= ended and len(cut) == 6:
                return found


def _nothing_is_lost(found: list[Any], answered: list[str]) -> None:
    ends = _ends(found)
    settle(
        answered,
        [event.request.target.decode() for event in flows(found, FlowCompleted) if event.response.status == 200],
        accounts_of_events(found),
    )
    assert len({event.flow_id for event in ends}) == len(ends)
    cut = [event for event in ends if isinstance(event, FlowInterrupted)]
    targets = [event.request.target for event in cut]
    assert sorted(target for target in targets if target.startswith(b"/close/")) == [
        b"/close/9000?%d" % number for number in range(6)
    ]
    assert targets.count(b"/length/20000000") == 1


def _ends(found: list[Any]) -> list[Any]:
    return [event for event in found if isinstance(event, FlowCompleted | FlowFailed | FlowInterrupted)]
