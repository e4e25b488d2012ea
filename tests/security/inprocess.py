"""The proxy in this process, so that a test can change its settings while clients are connected."""

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megido_capture.addon import MegidoAddon
from megido_capture.master import CaptureMaster
from megido_capture.node import Node
from tests.integration.capture.harness import Proxy


@dataclass
class Served(Proxy):
    """Without `process`: nothing that needs one may be asked of it."""

    node: Node = None  # type: ignore[assignment]

    def change(self, **settings: Any) -> None:
        """As a new configuration does, secrets included that no option of the start could give."""
        changed = replace(self.node.access.settings, **settings).checked()
        self.node.gate.apply(changed)
        self.node.own_door.apply(changed)
        self.node.access.settings = changed


@contextlib.asynccontextmanager
async def serving(data_dir: Path, **options: Any) -> AsyncIterator[Served]:
    addon = MegidoAddon({}, hosted=False)
    master = CaptureMaster(addon, ["regular"], fast=False)
    fixed = {"listen_host": "127.0.0.1", "listen_port": 0, "mode": ["regular"], "megido_forwarder": False}
    master.options.update(**fixed, megido_data_dir=str(data_dir), **options)
    addon.begin()
    node = addon.node
    assert node is not None
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(master.serve(stop, ready.set))
    try:
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([waiting, serving], return_when=asyncio.FIRST_COMPLETED)
        assert ready.is_set(), serving.result()
        port = int(node.listening().rpartition(":")[2])
        nothing: Any = None
        yield Served(nothing, data_dir, port, node=node)
    finally:
        node.registry.flows.clear()  # what a test leaves open is not waited for
        stop.set()
        await serving
        atexit.unregister(node.journal.close)
        node.journal.close()
