"""What an earlier life left open is interrupted, once, with what it had recorded."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from mitmproxy.test import tflow

from megido_capture.counters import Counters
from megido_capture.recording import recovery
from megido_capture.recording.emitter import Emitter
from megido_capture.recording.recorder import Recorder
from megido_capture.recording.state import Keep, Registry
from megido_capture.websocket.recovery import left_open
from megido_shared import events, ids
from megido_shared.bus.local import Journal
from megido_shared.bus.topics import FLOWS, WEBSOCKET
from megido_shared.clock import SystemClock
from megido_shared.datadir import DataDir
from megido_shared.events import FlowInterrupted, WebSocketMessage

CAP = 1000


class Life:
    """One run of a node, up to its death: nothing is ended that is not told to."""

    def __init__(self, directory: Path) -> None:
        self.journal = Journal.open(DataDir(directory), "capture")
        self.emitter = Emitter(self.journal, "browser")
        self.registry = Registry()
        self.recorder = Recorder(self.emitter, self.registry, Counters(), SystemClock(), Keep(True, CAP, CAP, CAP))

    def open(self, *pieces: bytes) -> tuple[Any, bytes]:
        """A flow that was announced, and pieces of its streamed answer."""
        flow = tflow.tflow(resp=True)
        assert flow.response is not None
        flow.response.raw_content = None
        self.recorder.open(flow)
        state = self.registry.flows[flow.id]
        self.recorder.announce(state)
        for index, piece in enumerate(pieces):
            self.emitter.chunk(state.flow_id, "response", index, piece, state.time_us)
        return flow, state.flow_id

    def recover(self) -> None:
        for fields in recovery.interrupted(self.journal, CAP):
            recovery.write(self.emitter, fields)

    def interrupted(self) -> list[FlowInterrupted]:
        found = [events.decode(record.value) for record in self.journal.read_back(FLOWS.name)]
        return [event for event in found if isinstance(event, FlowInterrupted)]


@pytest.fixture
def first(tmp_path: Path) -> Life:
    return Life(tmp_path)


def test_open_flows_of_earlier_lives_only(tmp_path: Path, first: Life) -> None:
    _, cut = first.open(b"abc", b"de")
    whole, _ = first.open(b"x")
    first.recorder.complete(whole)
    _, long = first.open(bytes(CAP))
    first.journal.close()
    second = Life(tmp_path)
    ours, _ = second.open(b"mine")
    second.recover()
    found = {event.flow_id: event for event in second.interrupted()}
    assert set(found) == {cut, long} and len(second.interrupted()) == 2
    body = found[cut].response.body  # type: ignore[union-attr]
    assert (body.size, body.chunks, body.sha256, body.truncated) == (5, 2, sha256(b"abcde").digest(), False)
    assert found[long].response.body.truncated  # type: ignore[union-attr]
    assert found[cut].request.body.data == b"content" and {event.seq for event in found.values()} == {2, 3}
    second.recorder.complete(ours)
    second.journal.close()
    third = Life(tmp_path)
    third.recover()
    assert len(third.interrupted()) == 2, "nothing is told twice"
    third.journal.close()


def test_also_after_the_clock_was_set_back(tmp_path: Path, first: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    later = (ids.time_ms(ids.new_id()) + 3_600_000).to_bytes(6)
    monkeypatch.setattr("megido_capture.recording.recorder.ids.new_id", lambda: later + bytes(10))
    _, cut = first.open(b"abc")
    monkeypatch.undo()
    first.journal.close()
    second = Life(tmp_path)
    second.recover()
    assert [event.flow_id for event in second.interrupted()] == [cut]
    second.journal.close()


def test_a_record_that_cannot_be_read_keeps_no_socket_from_its_end(tmp_path: Path, first: Life) -> None:
    stamp: dict[str, Any] = {"flow_id": ids.new_id(), "url": "ws://h/", "direction": "SEND"}
    keys = [ids.to_text(ids.new_id()) for _ in range(3)]
    for key, kind, size in ((keys[0], "TEXT", 5), (keys[1], "CLOSE", 0), (keys[2], "BINARY", 100_000)):
        message = WebSocketMessage(
            **stamp,
            **first.emitter.terminal(1),
            message_id=ids.new_id(),
            connection_id=key,
            message_type=kind,  # type: ignore[arg-type]
            payload=bytes(size),
            size=size,
            truncated=False,
            sequence=0,
        )
        first.emitter.write(message)
    first.journal.append(WEBSOCKET.name, ids.new_id(), b"\xff", 9)
    first.journal.close()
    second = Life(tmp_path)
    ends = list(left_open(second.journal))
    assert [(end.connection_id, end.payload) for end in ends if end.size > 5] == [(keys[2], b"")]
    assert {end.connection_id for end in ends} == {keys[0], keys[2]}
    second.journal.close()


def test_a_first_life_has_nothing_to_recover(first: Life) -> None:
    first.open(b"abc")
    first.recover()
    assert not first.interrupted()
    first.journal.close()
