"""One capture node, put together here: journal, addons, and what runs beside them."""

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mitmproxy import connection, http
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.proxy import events as proxy_events
from mitmproxy.proxy import layer
from mitmproxy.proxy.server import ConnectionIO

from megido_capture.access.authentication import Access
from megido_capture.access.closed import Closed
from megido_capture.access.farewell import Farewell, cut
from megido_capture.access.gate import AddressGate
from megido_capture.access.openroutes import OpenRoutes
from megido_capture.access.owndoor import OwnDoor, doors_of
from megido_capture.cache.switch import Cache
from megido_capture.configuration.lastgood import LastKnownGood
from megido_capture.configuration.live import LiveConfiguration, Start
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.configuration.source import ConfigSource
from megido_capture.counters import Counters
from megido_capture.drain import Drain, relays
from megido_capture.heartbeat import Config, Figures, Heartbeat
from megido_capture.limits.clients import Limits
from megido_capture.limits.server_deadlines import Timeouts
from megido_capture.mitm import fastpath
from megido_capture.mitm.flowcontrol import control_flow, stop_controlling
from megido_capture.mitm.headguard import guard_heads, stop_guarding
from megido_capture.mitm.http1 import mend, stop_mending
from megido_capture.mitm.interim import skip_interim, stop_skipping
from megido_capture.mitm.openconnections import CrashWatch, OpenConnections
from megido_capture.mitm.versions import require_tested
from megido_capture.passthrough import PassThrough
from megido_capture.recording import recovery
from megido_capture.recording.backpressure import Backpressure
from megido_capture.recording.connections import Connections
from megido_capture.recording.emitter import Emitter
from megido_capture.recording.errors import cause_of_message
from megido_capture.recording.flows import content_length
from megido_capture.recording.recorder import Recorder
from megido_capture.recording.state import Keep, Registry
from megido_capture.recording.streaming import Streaming
from megido_capture.rules.bodies import StreamedRules
from megido_capture.rules.heads import Rules, RuleSet
from megido_capture.websocket import WebSockets, observe, stop_observing
from megido_capture.websocket.recovery import left_open, write_close
from megido_shared.addresses import Endpoint
from megido_shared.bus.base import Bus
from megido_shared.bus.forwarder_child import ForwarderChild
from megido_shared.bus.local import Journal, Room, group_is_live
from megido_shared.bus.local.config import ConfigFiles
from megido_shared.clock import Clock, SystemClock
from megido_shared.settings import MIN_JOURNAL_CAP, Common

logger = logging.getLogger(__name__)

INGEST_GROUP = "ingest"
"""The consumer group whose live members say that an API publishes on this data directory's bus."""

TICK = 0.1
DRAIN = 10.0
"""Seconds that open flows get to end when the node stops."""
RECOVERY = 3.0
"""Seconds of them for what earlier lives left open: what is not told by then is told at the next start."""
CUT = 1.0
"""Seconds that the hooks of connections which were cut then get to tell their ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a node runs: data directory and bus, its name, whether it has a forwarder of its own, and how many
    processes share its port and with it the limits on clients."""

    common: Common
    name: str = "capture"
    forwarder: bool = True
    loopback_only: bool = False
    workers: int = 1
    protect: str = ""


class Node:
    """Made in the event loop's thread. `addons` are in the order in which their hooks must run."""

    _recover_until = float("inf")
    """On `time.monotonic()`."""

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
        settings = start.settings
        self.place = place
        self._ssl_insecure = ssl_insecure
        self._proxyserver = proxyserver
        self.journal = Journal.open(place.common.data_dir, place.name, cap_bytes=self._journal_cap(settings))
        # Never closed before the process ends: hooks of cut connections still come after `done`.
        atexit.register(self.journal.close)
        self.live = live = LiveConfiguration(
            start,
            ("global", f"app:{settings.source_app}", f"node:{self.journal.node}"),
            check=check,
            store=LastKnownGood(place.common.data_dir.last_known_good, self.journal.node),
        )
        self._read_local_bus()
        settings = self.settings = live.settings
        self.counters = Counters()
        self.backpressure = Backpressure(Room(self.journal), self.counters, settings.journal_wait)
        self.registry = Registry()
        self.emitter = emitter = Emitter(self.journal, settings.source_app)
        self.rule_set = RuleSet(self.counters, settings.source_app)
        self.recorder = recorder = Recorder(emitter, self.registry, self.counters, clock, Keep.of(settings))
        self.connections = Connections(emitter, self.registry, recorder, self.counters, clock)
        farewell = Farewell(self._transport)
        self.gate = AddressGate(
            emitter,
            self.registry,
            self.counters,
            clock,
            settings,
            farewell=farewell,
            loopback_only=place.loopback_only,
        )
        self.access = Access(
            emitter,
            self.registry,
            self.counters,
            clock,
            settings,
            close_with=self._close_with,
            transport=self._transport,
        )
        self.timeouts = Timeouts(
            settings, self.registry, self.connections, self.counters, cut=self._cut, silent_for=self._silent_for
        )
        self.websockets = WebSockets(emitter, self.registry, recorder, self.counters, clock)
        self.websockets.enabled = settings.websocket_enabled and settings.logging_enabled
        self.websockets.max_message = settings.websocket_max_message
        self.config_source = ConfigSource(
            live,
            open_bus=self._open_bus,
            bus_is_fed=self._bus_is_fed,
            api_url=settings.api_url,
            source_app=settings.source_app,
            node=self.journal.node,
            cache_ttl=settings.cache_ttl,
        )
        self.heartbeat = Heartbeat(
            emitter, self.counters, clock, listen=self.listening, config=self._config, pinned=self._pinned
        )
        self.figures = Figures(emitter, self.counters, self.registry, self._config)
        self._forwarder = (
            ForwarderChild(place.common.data_dir, kafka=place.common.kafka, api_url=settings.api_url)
            if place.forwarder
            else None
        )
        self.own_door = OwnDoor(
            doors_of(settings.api_url, place.common, place.protect),
            settings,
            self.counters,
            listening=lambda: [Endpoint(host or "localhost", port) for host, port, *_ in proxyserver.listen_addrs()],
            refuse=self._refuse_server,
            routes=OpenRoutes(
                self.registry,
                self.counters,
                note=self.connections.note,
                relays=lambda client, server: relays(self._layer_of(client), server),
                cut_server=self._cut,
                cut_client=partial(cut, self._transport, why="destination blocked"),
            ),
        )
        self.limits = Limits(
            settings, self.registry, self.connections, self.counters, farewell=farewell, workers=place.workers
        )
        self.pass_through = PassThrough(settings, self.counters, begun=self.limits.tunnel_begun)
        self.cache = Cache(self.registry, self.counters, settings)
        blocks = settings.journal_policy == "block"
        self.addons: list[Any] = [
            Closed(lambda: live.closed, self.counters),
            self.gate,  # before anything of a client is counted
            self.limits,
            self.connections,
            self.access,  # before anybody records, or sets a stream
            self.timeouts,
            self.pass_through,
            self.own_door,
            *([self.backpressure.messages] if blocks else []),
            self.websockets,  # before the recorder forgets a handshake
            _Before(recorder),
            *([self.backpressure] if blocks else []),
            Rules(self.rule_set, self.registry, self.counters),
            self.cache,  # behind what changes a request, before what streams and records a response
            Streaming(
                emitter,
                self.registry,
                recorder,
                self.counters,
                self._must_buffer,
                flow_control=control_flow(proxyserver.connections),
            ),
            StreamedRules(self.rule_set, self.registry, self.counters),
            recorder,
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()
        self._recovery: threading.Thread | None = None
        self._drain: Drain | None = None
        self._put_into_mitmproxy()
        connected = OpenConnections(proxyserver)
        recorder.arrived, recorder.was_reset = connected.arrived, connected.was_reset
        self._crash_watch = CrashWatch(connected, self.connections.crashed)
        live.put_in_force = self._apply
        self._begin()

    def _put_into_mitmproxy(self) -> None:
        observe(self.websockets)
        skip_interim()
        guard_heads(self.connections, self.limits.head_begun)
        mend(self.connections)
        fastpath.stand_in_front()

    def restart(self, start: Start) -> None:
        """Other options than at the start. Raises ConfigurationError and changes nothing when they cannot be."""
        self.live.restart(start)

    def _begin(self) -> None:
        """Nobody is served yet, and nobody is without the rules."""
        self._apply_settings(self.live.settings)
        self.rule_set.replace(self.live.rules)
        self._applied(self.live.version)

    def _apply(self) -> None:
        """Puts the live configuration in force while traffic flows."""
        self._apply_settings(self.live.settings)  # access first: patterns may take a second to compile
        self.rule_set.load(self.live.rules, partial(self._applied, self.live.version))

    def _applied(self, version: int) -> None:
        """That version's settings and rules are in force."""
        self._in_force = version
        self.heartbeat.soon()

    def _apply_settings(self, settings: CaptureSettings) -> None:
        self.gate.apply(settings)
        self.own_door.apply(settings)
        self.settings = self.access.settings = self.timeouts.settings = self.limits.settings = settings
        self.recorder.keep = Keep.of(settings)
        self.cache.apply(settings)
        self.pass_through.apply(settings)
        self.journal.cap_bytes = self._journal_cap(settings)
        self.backpressure.seconds = settings.journal_wait
        self.websockets.enabled = settings.websocket_enabled and settings.logging_enabled
        self.websockets.max_message = settings.websocket_max_message
        self.config_source.cache_ttl = settings.cache_ttl

    def _journal_cap(self, settings: CaptureSettings) -> int:
        """The data directory's disk is one: each worker's journal has its part of it."""
        return max(MIN_JOURNAL_CAP, settings.journal_cap_bytes // self.place.workers)

    def start(self) -> None:
        """The node serves: says so, and begins what runs beside the hooks."""
        self.heartbeat.beat("started")
        loop = asyncio.get_running_loop()
        self._recovery = threading.Thread(target=self._recover, args=(loop,), name="recovery", daemon=True)
        self._recovery.start()
        self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self.config_source.run())]

    async def end_connections(self) -> None:
        """From now on none is accepted, and connections end with what is in flight on them, idle ones at once."""
        for instance in self._proxyserver.servers:
            if instance.is_running:
                await instance.stop()
        self._drain = Drain(
            self.registry,
            self.counters,
            silent_for=self._silent_for,
            layer_of=self._layer_of,
            cut=partial(cut, self._transport, why="stop"),
        )
        # A new list: hooks that wait for something are still walking the old one.
        self.addons = [self._drain, *self.addons]

    async def drain(self, seconds: float = DRAIN, hurry: asyncio.Event | None = None) -> None:
        """Waits until every flow has ended, and until what earlier lives left open is told, at most `seconds` and not
        once `hurry` is set; what is open then becomes `FlowInterrupted`, here or at the next start, and no client is
        served any more."""
        self.backpressure.room.give_up()
        deadline = time.monotonic() + seconds
        self._recover_until = time.monotonic() + min(seconds, RECOVERY)
        while self._busy() and time.monotonic() < deadline and not (hurry and hurry.is_set()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # hooks end what is open
        self._recover_until = 0.0
        await self.websockets.end_all(self._proxyserver.inject_event)
        await self._cut_clients()
        for state in list(self.registry.flows.values()):
            self.recorder.interrupt(state)

    async def _cut_clients(self) -> None:
        """Before anything is recorded as interrupted: whoever is still connected may get the whole answer."""
        self.recorder.stopping = self.websockets.cutting = True
        deadline = time.monotonic() + CUT
        for client in list(self.registry.clients.values()):
            cut(self._transport, client.conn, why="stop")
        while self.registry.clients and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # hooks end them
        self.websockets.give_up()

    def _busy(self) -> bool:
        in_use = self._drain.step() if self._drain is not None else bool(self.registry.flows)
        return in_use or self._recovering()

    def _recovering(self) -> bool:
        alive = self._recovery is not None and self._recovery.is_alive()
        return alive and time.monotonic() < self._recover_until

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.rule_set.stop_loading()
        self.heartbeat.beat("stopping")
        stop_observing()
        self._crash_watch.stop()
        stop_mending()
        stop_guarding()
        stop_controlling()
        stop_skipping()
        if self._forwarder is not None:
            await asyncio.to_thread(self._forwarder.stop)

    def listening(self) -> str:
        return ",".join(f"{host}:{port}" for host, port, *_ in self._proxyserver.listen_addrs())

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            for step in (
                self.recorder.tick,
                self.timeouts.tick,
                self.limits.tick,
                self.heartbeat.tick,
                self._keep_forwarding,
            ):
                try:
                    step(now)
                except Exception as error:  # noqa: BLE001 - one failing step must not stop the others
                    self.counters.hook_failed(f"tick_{step.__name__}", error)
            await asyncio.sleep(TICK)

    def _keep_forwarding(self, now: float) -> None:
        if self._forwarder is not None:
            self._forwarder.tick(now)

    def _recover(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: a long journal takes a while to read, and the proxy serves meanwhile."""
        try:
            for fields in recovery.interrupted(self.journal, self.settings.max_body_size):
                if time.monotonic() > self._recover_until:
                    return
                recovery.write(self.emitter, fields)
                loop.call_soon_threadsafe(self.counters.update, {"recovered": 1})
            for last in left_open(self.journal):
                if time.monotonic() > self._recover_until:
                    return
                write_close(self.emitter, last)
        except Exception as error:  # noqa: BLE001 - told, and the node goes on
            loop.call_soon_threadsafe(self.counters.hook_failed, "recovery", error)

    def _must_buffer(self, flow: http.HTTPFlow) -> bool:
        return self.rule_set.must_buffer(flow.request, content_length(flow.request.headers))

    def _open_bus(self) -> Bus:
        from megido_shared.bus.open import open_bus  # noqa: PLC0415 - loads the Kafka client where it is used

        return open_bus(self.place.common)

    def _bus_is_fed(self) -> bool:
        return bool(self.place.common.kafka) or group_is_live(self.place.common.data_dir, INGEST_GROUP)

    def _read_local_bus(self) -> None:
        """At once, in place of a tenth of a second after the first client."""
        if not self.place.common.kafka:
            files = ConfigFiles(self.place.common.data_dir.config)
            for scope in self.live.scopes:
                if (raw := files.get(scope)) is not None:
                    self.live.take(scope, raw)

    def _config(self) -> Config:
        return Config(self._in_force, self.config_source.stale, self.live.error)

    def _pinned(self) -> dict[str, str]:
        return self.live.pinned() | ({"ssl_insecure": "true"} if self._ssl_insecure() else {})

    def _cut(self, client: connection.Client, server: connection.Server) -> bool:
        """Ends an upstream connection through its handler's task: mitmproxy has no call for it."""
        handler = self._proxyserver.connections.get(client.id)
        transport = handler.transports.get(server) if handler else None
        if handler is None or transport is None or transport.handler is None:
            return False
        if server.timestamp_tcp_setup is not None and not server.state & connection.ConnectionState.CAN_READ:
            # Closed by the peer already: that was told once, to a layer that was not listening yet.
            told = asyncio.ensure_future(handler.server_event(proxy_events.ConnectionClosed(server)))
            self._telling.add(told)
            told.add_done_callback(self._telling.discard)
        return transport.handler.cancel("timeout")

    def _transport(self, client: connection.Client) -> ConnectionIO | None:
        handler = self._proxyserver.connections.get(client.id)
        return handler.transports.get(client) if handler else None

    def _layer_of(self, client: connection.Client) -> layer.Layer | None:
        handler = self._proxyserver.connections.get(client.id)
        return handler.layer if handler else None

    def _silent_for(self, client: connection.Client) -> float:
        """Seconds since anything came from the client or from its upstreams."""
        handler = self._proxyserver.connections.get(client.id)
        return time.time() - handler.timeout_watchdog.last_activity if handler else 0.0

    def _refuse_server(self, client: connection.Client, server: connection.Server, why: str) -> None:
        """Ends a connection that has just been made. What mitmproxy writes to it from now on goes nowhere."""
        self.connections.note(client, server, cause_of_message(why))
        handler = self._proxyserver.connections.get(client.id)
        transport = handler.transports.get(server) if handler else None
        if transport is None or transport.writer is None:
            return
        if isinstance(transport.writer, asyncio.StreamWriter):
            transport.writer.transport.abort()
        else:
            transport.writer.close()  # type: ignore[no-untyped-call]

    def _close_with(self, client: connection.Client, data: bytes) -> None:
        """Writes to a client past mitmproxy's layers, which would wait for the rest of its request first."""
        handler = self._proxyserver.connections.get(client.id)
        transport = handler.transports.get(client) if handler else None
        if client.tls or transport is None or transport.writer is None:
            return
        transport.writer.write(data)


class _Before:
    """Opens the flow's state ahead of the addons that use it; the recorder itself ends it behind them."""

    name = "megido-recorder-open"

    def __init__(self, recorder: Recorder) -> None:
        self.requestheaders: Callable[[http.HTTPFlow], None] = recorder.open
