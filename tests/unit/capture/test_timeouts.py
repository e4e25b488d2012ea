"""Timers over upstream connections leave nothing behind."""

import asyncio

from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.test import tflow

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.limits.server_deadlines import Timeouts
from megido_capture.recording.connections import Connections
from tests.unit.capture.fakes import Parts


def cut(client: object, server: object) -> bool:
    raise AssertionError("there is nothing to cut")


async def test_a_client_that_left_before_its_connection_was_begun_leaves_nothing() -> None:
    parts, flow = Parts(), tflow.tflow()
    connections = Connections(parts.emitter, parts.registry, parts.recorder, parts.counters, parts.clock)
    timeouts = Timeouts(
        CaptureSettings(connection_timeout=1),
        parts.registry,
        connections,
        parts.counters,
        cut=cut,
        silent_for=lambda client: 0.0,
    )
    server = flow.server_conn.copy()
    server.state = type(server.state).CLOSED
    server.timestamp_start = None  # it waits for its turn
    data = ServerConnectionHookData(server=server, client=flow.client_conn)
    connections.client_connected(flow.client_conn)
    connections.server_connect(data)
    timeouts.server_connect(data)
    timeouts._expire(data)
    assert len(timeouts._timers) == 1 and parts.registry.servers, "its client still waits with it"
    connections.client_disconnected(flow.client_conn)
    timeouts._timers.pop(server.id).cancel()
    timeouts._expire(data)
    await asyncio.sleep(0)
    assert not timeouts._timers and not parts.registry.servers
