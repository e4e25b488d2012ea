"""The recorder with mitmproxy's own test flows: one terminal event each, and never an exception."""

from collections.abc import Callable
from typing import Any

import pytest
from mitmproxy import http
from mitmproxy.flow import Error
from mitmproxy.test import tflow

from megido_capture.recording.connections import Connections
from megido_capture.recording.emitter import MAX_INLINE
from megido_capture.recording.errors import cause_of_message
from megido_shared.events import BodyChunk, ErrorRaised, FlowCompleted, FlowFailed, FlowInterrupted, FlowStarted
from tests.unit.capture.fakes import Parts


def test_completed_once() -> None:
    parts, flow = Parts(), tflow.tflow(resp=True)
    parts.recorder.open(flow)
    for _ in range(2):
        parts.recorder.response(flow)
    parts.recorder.error(flow)
    [event] = parts.journal.records
    assert isinstance(event, FlowCompleted) and event.seq == 1 and not parts.registry.flows
    assert event.request.body.data == b"content" and event.response.body.data == b"message"
    assert event.time_us == parts.clock.time_us()


def test_failed_once_with_what_was_noted() -> None:
    parts, flow = Parts(), tflow.tflow(err=True)
    connections = Connections(parts.emitter, parts.registry, parts.recorder, parts.counters, parts.clock)
    connections.client_connected(flow.client_conn)
    parts.recorder.open(flow)
    flow.server_conn.address = (flow.request.host, flow.request.port)
    connections.note(flow.client_conn, flow.server_conn, cause_of_message("Certificate verify failed: expired"))
    connections.note(flow.client_conn, flow.server_conn, cause_of_message("connection closed"))
    flow.error = Error("connection closed")
    parts.recorder.error(flow)
    connections.client_disconnected(flow.client_conn)
    [event] = parts.journal.records
    assert isinstance(event, FlowFailed) and event.failure.error_type == "SSL_ERROR"
    assert not parts.registry.clients and not parts.registry.flows


def test_a_cause_without_a_flow_is_told_at_the_disconnect() -> None:
    parts, flow = Parts(), tflow.tflow()
    connections = Connections(parts.emitter, parts.registry, parts.recorder, parts.counters, parts.clock)
    connections.client_connected(flow.client_conn)
    flow.server_conn.address = ("h", 443)
    connections.note(flow.client_conn, flow.server_conn, cause_of_message("timeout"))
    connections.client_disconnected(flow.client_conn)
    [event] = parts.journal.records
    assert isinstance(event, ErrorRaised) and (event.url, event.failure.error_type) == ("https://h/", "TIMEOUT")


def test_what_mitmproxy_never_ended_ends_with_its_client() -> None:
    parts, flow = Parts(), tflow.tflow()
    connections = Connections(parts.emitter, parts.registry, parts.recorder, parts.counters, parts.clock)
    connections.client_connected(flow.client_conn)
    parts.recorder.open(flow)
    connections.client_disconnected(flow.client_conn)
    [event] = parts.journal.records
    assert isinstance(event, FlowFailed) and event.failure.error_type == "CONNECTION_RESET"
    assert not parts.registry.flows and not parts.registry.clients


def test_announced_once_and_interrupted() -> None:
    parts, flow = Parts(), tflow.tflow()
    parts.recorder.open(flow)
    state = parts.registry.flows[flow.id]
    parts.recorder.tick(state.started + 0.4)
    assert not parts.journal.records
    for _ in range(2):
        parts.recorder.tick(state.started + 0.6)
    parts.recorder.interrupt(state)
    started, interrupted = parts.journal.records
    assert isinstance(started, FlowStarted) and started.seq == 0
    assert isinstance(interrupted, FlowInterrupted) and interrupted.seq == 1


def test_a_record_stays_under_the_limit() -> None:
    parts, flow = Parts(cap=10 << 20), tflow.tflow(resp=True)
    assert flow.response is not None
    flow.request.raw_content, flow.response.raw_content = b"q" * 700_000, b"s" * 600_000
    parts.recorder.open(flow)
    parts.recorder.response(flow)
    *chunks, event = parts.journal.records
    assert max(parts.journal.sizes) < 900_000 and all(isinstance(chunk, BodyChunk) for chunk in chunks)
    assert b"".join(chunk.data for chunk in chunks) == b"q" * 700_000 and event.request.body.chunks == len(chunks)
    assert event.response.body.data == b"s" * 600_000 and len(event.request.body.sha256) == 32
    assert MAX_INLINE < 900_000


def _raise(flow: http.HTTPFlow) -> Any:
    raise AttributeError("_paused_event_queue")


def _broken_headers(flow: http.HTTPFlow) -> None:
    flow.request.data.headers.fields = ((b"name",),)  # type: ignore[assignment]


def _broken_host(flow: http.HTTPFlow) -> None:
    flow.request.data.host = "h\udc80"


@pytest.mark.parametrize("end", ["response", "error", "interrupt", "client_gone"])
@pytest.mark.parametrize(
    ("damage", "why", "host"), [(_broken_headers, "ValueError", "address"), (_broken_host, "UnicodeEncodeError", "h?")]
)
def test_a_record_that_cannot_be_made_leaves_what_can_be_said(
    end: str, damage: Callable[[http.HTTPFlow], None], why: str, host: str
) -> None:
    parts, flow = Parts(), tflow.tflow(resp=True)
    parts.recorder.open(flow)
    damage(flow)
    state = parts.registry.flows[flow.id]
    subject: Any = {"interrupt": state, "client_gone": [state]}.get(end, flow)
    getattr(parts.recorder, end)(subject)
    [event] = parts.journal.records
    assert isinstance(event, FlowFailed) and (event.seq, parts.journal.last_seq) == (1, 1)
    assert (event.request.method, event.request.host, event.request.target) == (b"GET", host, b"/path")
    assert event.failure.error_type == "OTHER" and why in event.failure.message
    assert parts.counters["failed"] == parts.counters["hook_errors:record"] == 1


def test_what_cannot_be_asked_of_mitmproxy_costs_no_record() -> None:
    parts, streamed, cut = Parts(), tflow.tflow(resp=True), tflow.tflow(err=True)
    parts.recorder.arrived = parts.recorder.was_reset = _raise
    assert streamed.response is not None
    streamed.response.stream, cut.request.raw_content = lambda data: data, None
    for flow in (streamed, cut):
        parts.recorder.open(flow)
    del streamed.response.headers["content-length"]
    parts.recorder.response(streamed)
    parts.recorder.error(cut)
    completed, failed = parts.journal.records
    assert isinstance(completed, FlowCompleted) and isinstance(failed, FlowFailed)
    assert parts.counters["hook_errors:was_reset"] == parts.counters["hook_errors:arrived"] == 1


def test_a_hook_that_fails_is_counted_and_raises_nothing() -> None:
    parts, flow = Parts(), tflow.tflow(resp=True)
    parts.recorder.open(flow)
    parts.journal.broken = True
    parts.recorder.response(flow)
    assert parts.counters["hook_errors"] == 1 and parts.counters["hook_errors:response"] == 1
