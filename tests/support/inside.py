"""The proxy of `megido capture` inside the test's own loop, for what is changed while it serves."""

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megido_capture.addon import MegidoAddon
from megido_capture.configuration.live import Start
from megido_capture.master import CaptureMaster
from megido_capture.node import Node
from tests.integration.capture.harness import read_events, until


@dataclass
class Inside:
    """`curl` and the readers of the harness take it for a `Proxy`."""

    node: Node
    data_dir: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ca(self) -> Path:
        return self.data_dir / "ca" / "mitmproxy-ca-cert.pem"

    def apply(self, **changed: Any) -> None:
        """Other settings from now on. Raises ConfigurationError and changes nothing when they cannot be."""
        self.node.restart(Start(replace(self.node.settings, **changed)))

    async def events(self) -> list[Any]:
        """Everything in the journal, heartbeats left out."""
        return [event for event in await read_events(self.data_dir) if type(event).__name__ != "NodeStatus"]

    async def until(self, enough: Any) -> list[Any]:
        return await until(self.events, enough)


@contextlib.asynccontextmanager
async def inside(data_dir: Path, **options: Any) -> AsyncIterator[Inside]:
    """A proxy on a free port of loopback with mitmproxy's and our `options`."""
    addon = MegidoAddon({}, hosted=False)
    master = CaptureMaster(addon, ["regular"], fast=False)
    fixed = {"listen_host": "127.0.0.1", "listen_port": 0, "megido_data_dir": str(data_dir), "megido_forwarder": False}
    master.options.update(**fixed, **options)
    addon.begin()
    stop, ready = asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(master.serve(stop, ready.set))
    started = asyncio.create_task(ready.wait())
    await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        started.cancel()
        serving.result()
    node = addon.node
    assert node is not None
    try:
        yield Inside(node, data_dir, int(node.listening().rpartition(":")[2]))
    finally:
        node.parts.registry.flows.clear()  # what a test leaves open is not waited for
        stop.set()
        await serving
        atexit.unregister(node.journal.close)
