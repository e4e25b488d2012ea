"""What is judged at each hook of a connection to a server, hook by hook."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from mitmproxy import connection
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
