"""The life of a capture node: made, started, kept going, told of other options, ended."""

import asyncio
import atexit
import logging
import time
from collections.abc import Callable
from typing import Any

from mitmproxy.addons.proxyserver import Proxyserver

from megido_capture.configuration.lastgood import LastKnownGood
from megido_capture.configuration.live import LiveConfiguration, Start
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.heartbeat import Figures, Heartbeat
from megido_capture.mitm.versions import require_tested
from megido_capture.node.ending import Ending
from megido_capture.node.inforce import InForce, journal_cap, read_local_bus
from megido_capture.node.parts import Parts, Place
from megido_capture.node.retelling import Retelling
from megido_capture.stopping import Budget
from megido_shared.bus.forwarder_child import ForwarderChild
from megido_shared.bus.local import Journal
from megido_shared.clock import Clock, SystemClock

logger = logging.getLogger(__name__)

TICK = 0.1


class Node:
    """Made in the event loop's thread. `addons` are in the order in which their hooks must run."""

    def __init__(
        self,
        start: Start,
        place: Place,
        proxyserver: Proxyserver,
        clock: Clock | None = None,
        *,
        check: Callable[[CaptureSettings], None] = lambda _: None,
        ssl_insecure: Callable[[], bool] = lambda: False,
    ) -> None:
        """Opens the journal, and reads what configuration there is on this machine: the first client is served under
        it. `check` raises ConfigurationError on settings that the listeners do not allow; so does this."""
        require_tested()
        clock = clock or SystemClock()
        self.place = place
        self._proxyserver = proxyserver
        self._ssl_insecure = ssl_insecure
        cap = journal_cap(start.settings, place.workers)
        self.journal = Journal.open(place.common.data_dir, place.name, cap_bytes=cap)
        # Never closed before the process ends: hooks of cut connections still come after `done`.
        atexit.register(self.journal.close)
        self.live = LiveConfiguration(
            start,
            ("global", f"app:{start.settings.source_app}", f"node:{self.journal.node}"),
            check=check,
            store=LastKnownGood(place.common.data_dir.last_known_good, self.journal.node),
        )
        read_local_bus(self.live, place.common)
        self.parts = parts = Parts(self.journal, self.live, place, proxyserver, clock)
        self.in_force = InForce(self.live, parts, self.journal, place)
        self.heartbeat = Heartbeat(
            parts.emitter,
            parts.counters,
            clock,
            listen=self.listening,
            config=self.in_force.config,
            pinned=self._pinned,
        )
        self.figures = Figures(parts.emitter, parts.counters, parts.registry, self.in_force.config)
        self.retelling = Retelling(self.journal, parts.emitter, parts.counters)
        self.forwarder = (
            ForwarderChild(place.common.data_dir, kafka=place.common.kafka, api_url=self.settings.api_url)
            if place.forwarder
            else None
        )
        self._ending = Ending(parts, proxyserver, self.retelling)
        self._tasks: list[asyncio.Task[None]] = []
        self.addons: list[Any] = parts.in_order()
        parts.put_into_mitmproxy()
        self.in_force.told.append(self.heartbeat.soon)
        self.in_force.begin()

    @property
    def settings(self) -> CaptureSettings:
        return self.parts.settings

    def restart(self, start: Start) -> None:
        """Other options than at the start. Raises ConfigurationError and changes nothing when they cannot be."""
        self.live.restart(start)

    def start(self) -> None:
        """The node serves: says so, and begins what runs beside the hooks."""
        self.heartbeat.beat("started")
        self.retelling.start(self.settings.max_body_size)
        self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self.in_force.source.run())]

    def budget(self) -> Budget:
        """Of a stop that begins now."""
        return Budget(self.place.stop_seconds, without=() if self.forwarder else ("forwarder",))

    async def end_connections(self) -> None:
        """From now on none is accepted, and connections end with what is in flight on them, idle ones at once."""
        # A new list: hooks that wait for something are still walking the old one.
        self.addons = [await self._ending.stop_listening(), *self.addons]

    async def drain(self, budget: Budget, hurry: asyncio.Event | None = None) -> None:
        """See `Ending.drain`."""
        await self._ending.drain(budget, hurry)

    async def stop(self, budget: Budget) -> None:
        """Ends what runs beside the hooks, the forwarder last: it ships what was written until then."""
        with budget.part("tasks") as deadline:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=max(0.0, deadline - time.monotonic()))
        self.parts.rule_set.stop_loading()
        self.parts.attempts.close()  # what the heartbeat says was captured, and what the forwarder ships, has all of it
        self.heartbeat.beat("stopping")
        self.parts.take_out_of_mitmproxy()
        if self.forwarder is not None:
            with budget.part("forwarder") as deadline:
                await asyncio.to_thread(self.forwarder.stop, max(0.0, deadline - time.monotonic()))
        logger.info("stopped in %s", budget)

    def listening(self) -> str:
        return ",".join(f"{host}:{port}" for host, port, *_ in self._proxyserver.listen_addrs())

    async def _tick(self) -> None:
        parts = self.parts
        while True:
            now = time.monotonic()
            for step in (
                parts.closed.tick,
                parts.recorder.tick,
                parts.timeouts.tick,
                parts.limits.tick,
                parts.attempts.tick,
                self.heartbeat.tick,
                self._keep_forwarding,
            ):
                try:
                    step(now)
                except Exception as error:  # noqa: BLE001 - one failing step must not stop the others
                    parts.counters.hook_failed(f"tick_{step.__name__}", error)
            await asyncio.sleep(TICK)

    def _keep_forwarding(self, now: float) -> None:
        if self.forwarder is not None:
            self.forwarder.tick(now)

    def _pinned(self) -> dict[str, str]:
        return self.live.pinned() | ({"ssl_insecure": "true"} if self._ssl_insecure() else {})
