"""Errors that whoever can connect may cause are told within a bound."""

from mitmproxy.test import tflow

from megido_capture.recording.connections import Connections
from megido_capture.recording.floods import ADDRESS_BURST
from tests.unit.capture.fakes import Parts


def test_a_flood_of_crashes_is_told_in_few() -> None:
    parts = Parts()
    connections = Connections(parts.emitter, parts.registry, parts.recorder, parts.counters, parts.clock)
    for _ in range(300):
        client = tflow.tclient_conn()
        connections.client_connected(client)
        connections.crashed(client, AssertionError("unexpected event"))
        connections.client_disconnected(client)
    told = len(parts.journal.records)
    assert ADDRESS_BURST <= told < 100 and parts.counters["crashes"] == 300
    assert told + parts.counters["errors_left_out"] == 300
