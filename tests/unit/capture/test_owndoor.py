"""What is judged at each hook of a connection to a server, hook by hook."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import pytest
from mitmproxy import connection
from mitmproxy.proxy import mode_specs
from mitmproxy.proxy.server_hooks import ServerConnectionHookData
from mitmproxy.test import tflow

from megido_capture.access.openroutes import OpenRoutes
from megido_capture.access.owndoor import OwnDoor
from megido_capture.configuration.settings import CaptureSettings
from megido_shared.addresses import Endpoint
from tests.unit.capture.fakes import Parts


class Doors:
    """An `OwnDoor` and what it did: `refused` at connected, `cut` of what was open."""

    def __init__(self, own: Iterable[tuple[Endpoint, str]] = (), **settings: Any) -> None:
        parts = Parts()
        self.counters = parts.counters
        self.settings = CaptureSettings(**settings)
        self.refused: list[str] = []
        self.cut: list[str] = []
        self.routes = OpenRoutes(
            parts.registry,
            parts.counters,
            note=lambda *_: None,
            relays=lambda *_: False,
            cut_server=lambda _, server: bool(self.cut.append(server.id)) or True,
            cut_client=lambda client: bool(self.cut.append(client.id)) or True,
        )
        self.addon = OwnDoor(
            own,
            self.settings,
            parts.counters,
            listening=list,
            refuse=lambda client, server, why: self.refused.append(why),
            routes=self.routes,
        )

    def apply(self, **changed: Any) -> None:
        self.addon.apply(replace(self.settings, **changed))


def to(host: str, peer: str, port: int = 80) -> ServerConnectionHookData:
    server = connection.Server(address=(host, port))
    server.peername = (peer, port)
    return ServerConnectionHookData(server, tflow.tclient_conn())


@pytest.mark.parametrize("blocked", ["late.example", "*.example:80", "198.51.100.0/24"])
async def test_what_is_blocked_while_it_is_connected_to_is_refused(blocked: str) -> None:
    doors, data = Doors(), to("Late.Example.", "198.51.100.7")
    if (waiting := doors.addon.server_connect(data)) is not None:
        await waiting
    assert not data.server.error
    doors.apply(blocked_destinations=blocked)
    assert doors.cut == []  # it is not open yet
    doors.addon.server_connected(data)
    assert len(doors.refused) == 1 and "blocked_destinations" in doors.refused[0]


async def test_what_is_not_blocked_is_open_and_cut_when_it_is() -> None:
    doors, data = Doors(blocked_destinations="other.example"), to("late.example", "198.51.100.7")
    doors.addon.server_connected(data)
    assert doors.refused == doors.cut == []
    doors.apply(blocked_destinations="late.example")
    assert doors.cut == [data.server.id]


async def test_what_another_proxy_was_asked_for_is_cut_when_it_cannot_be_judged() -> None:
    doors, client = Doors(), tflow.tclient_conn()
    # What no request can be: the judge fails on it.
    doors.routes.chained(client, (cast(str, None), 99))
    doors.apply(blocked_destinations="*.example")
    assert doors.cut == [client.id]
    assert doors.counters["hook_errors:own_door"] == 1


@pytest.mark.parametrize("gone", [False, True])
async def test_behind_another_proxy_only_clients_that_are_there_are_remembered(gone: bool) -> None:
    doors = Doors([(Endpoint("localhost", 80), "own API")])
    flow = tflow.tflow()
    flow.client_conn.proxy_mode = mode_specs.ProxyMode.parse("upstream:http://192.0.2.1:3128")
    flow.client_conn.timestamp_end = None
    flow.request.host, flow.request.port = "198.51.100.7", 80
    waiting = doors.addon.requestheaders(flow)
    assert waiting is not None
    if gone:
        flow.client_conn.timestamp_end = 1.0
        doors.addon.client_disconnected(flow.client_conn)
    await waiting
    assert flow.response is None
    doors.apply(blocked_destinations="198.51.100.7")
    assert doors.cut == ([] if gone else [flow.client_conn.id])
