"""How a node ends: what is in use gets its time, the rest is told and cut, all of it within one budget."""

import asyncio
import logging
import time
from functools import partial

from mitmproxy.addons.proxyserver import Proxyserver

from megido_capture.access.farewell import cut
from megido_capture.node.drain import Drain
from megido_capture.node.parts import Parts
from megido_capture.node.retelling import Retelling
from megido_capture.stopping import DRAIN, Budget

logger = logging.getLogger(__name__)

RECOVERY = 3.0
"""Seconds of the drain for what earlier lives left open: what is not told by then is told at the next start."""


class Ending:
    """`stop_listening`, then `drain`."""

    def __init__(self, parts: Parts, proxyserver: Proxyserver, retelling: Retelling) -> None:
        self._parts = parts
        self._proxyserver = proxyserver
        self._retelling = retelling
        self._drain: Drain | None = None

    async def stop_listening(self) -> Drain:
        """From now on no connection is accepted. Returns the addon that lets those end which there are."""
        for instance in self._proxyserver.servers:
            if instance.is_running:
                await instance.stop()
        parts = self._parts
        self._drain = Drain(
            parts.registry,
            parts.counters,
            parts.handlers,
            parts.unsent,
            cut=partial(cut, parts.handlers.transport, why="stop"),
        )
        return self._drain

    async def drain(self, budget: Budget, hurry: asyncio.Event | None = None) -> None:
        """Waits until every flow has ended and its client has the answer, and until what earlier lives left open is
        told, as long as the budget lets it and not once `hurry` is set; what is open then becomes `FlowInterrupted`,
        here or at the next start, and no client is served any more."""
        parts = self._parts
        parts.backpressure.room.give_up()
        with budget.part(DRAIN) as deadline:
            self._retelling.until = min(time.monotonic() + RECOVERY, deadline)
            while self._busy() and time.monotonic() < deadline and not (hurry and hurry.is_set()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # hooks end what is open
            self._retelling.until = 0.0
        with budget.part("websockets") as deadline:
            await parts.websockets.end_all(self._proxyserver.inject_event, deadline)
        with budget.part("cut") as deadline:
            await self._cut_clients(deadline)
        for state in list(parts.registry.flows.values()):
            parts.recorder.interrupt(state)
        if clients := parts.unsent.reset():
            logger.warning("%d clients had not read all of their answers when time was up", clients)

    async def _cut_clients(self, deadline: float) -> None:
        """Before anything is recorded as interrupted: whoever is still connected may get the whole answer."""
        parts = self._parts
        parts.recorder.stopping = parts.websockets.cutting = True
        for client in list(parts.registry.clients.values()):
            cut(parts.handlers.transport, client.conn, why="stop")
        while parts.registry.clients and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # hooks end them
        parts.websockets.give_up()

    def _busy(self) -> bool:
        in_use = self._drain.step() if self._drain is not None else bool(self._parts.registry.flows)
        return in_use or self._retelling.goes_on
