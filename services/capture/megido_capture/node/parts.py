"""What a capture node is made of, and the order of its addons."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mitmproxy import connection, http
from mitmproxy.addons.proxyserver import Proxyserver

from megido_capture.access.attempts import Attempts
from megido_capture.access.authentication import Access
from megido_capture.access.closed import Closed
from megido_capture.access.farewell import Farewell, cut
from megido_capture.access.gate import AddressGate
from megido_capture.access.openroutes import OpenRoutes
from megido_capture.access.owndoor import OwnDoor, doors_of
from megido_capture.cache.switch import Cache
from megido_capture.configuration.live import LiveConfiguration
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters
from megido_capture.limits.clients import Limits
from megido_capture.limits.server_deadlines import Timeouts
from megido_capture.mitm import fastpath
from megido_capture.mitm.flowcontrol import control_flow, stop_controlling
from megido_capture.mitm.handlers import Handlers
from megido_capture.mitm.headguard import guard_heads, stop_guarding
from megido_capture.mitm.http1 import mend, stop_mending
from megido_capture.mitm.interim import skip_interim, stop_skipping
from megido_capture.mitm.openconnections import CrashWatch, OpenConnections
from megido_capture.node.drain import relays
from megido_capture.node.unsent import Unsent
from megido_capture.passthrough import PassThrough
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
from megido_capture.stopping import STOP
from megido_capture.websocket import WebSockets, observe, stop_observing
from megido_shared.addresses import Endpoint
from megido_shared.bus.local import Journal, Room
from megido_shared.clock import Clock
from megido_shared.settings import Common


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a node runs: data directory and bus, its name, whether it has a forwarder of its own, how many processes
    share its port and with it the limits on clients, and the seconds of its stop."""

    common: Common
    name: str = "capture"
    forwarder: bool = True
    loopback_only: bool = False
    workers: int = 1
    protect: str = ""
    stop_seconds: float = STOP


class Parts:
    """Made in the event loop's thread, from the settings that are in force then."""

    def __init__(
        self, journal: Journal, live: LiveConfiguration, place: Place, proxyserver: Proxyserver, clock: Clock
    ) -> None:
        self._live = live
        self._place = place
        self._proxyserver = proxyserver
        self.settings = settings = live.settings
        self.clock = clock
        self.counters = Counters()
        self.registry = Registry()
        self.handlers = Handlers(proxyserver.connections)
        self.unsent = Unsent(self.handlers, self.counters)
        self.emitter = Emitter(journal, settings.source_app)
        self.rule_set = RuleSet(self.counters, settings.source_app)
        self.backpressure = Backpressure(Room(journal), self.counters, settings.journal_wait)
        self._record()
        self._admit()
        self._bound()
        self.cache = Cache(self.registry, self.counters, settings)

    def _record(self) -> None:
        emitter, registry, counters, clock = self.emitter, self.registry, self.counters, self.clock
        self.recorder = recorder = Recorder(emitter, registry, counters, clock, Keep.of(self.settings))
        self.connections = Connections(emitter, registry, recorder, counters, clock)
        self.websockets = WebSockets(emitter, registry, recorder, counters, clock)
        self.streaming = Streaming(
            emitter,
            registry,
            recorder,
            counters,
            self._must_buffer,
            flow_control=control_flow(self._proxyserver.connections),
        )

    def _admit(self) -> None:
        """Who is served, and where to."""
        place, settings, handlers = self._place, self.settings, self.handlers
        self.attempts = Attempts(self.emitter, self.clock)
        told = (self.attempts, self.registry, self.counters, settings)
        self.farewell = Farewell(handlers.transport)
        self.closed = Closed(
            lambda: self._live.closed,
            self.registry,
            self.counters,
            cut=partial(cut, handlers.transport, why="nobody is served"),
        )
        self.gate = AddressGate(*told, farewell=self.farewell, loopback_only=place.loopback_only)
        self.access = Access(*told, close_with=handlers.close_with, transport=handlers.transport)
        self.own_door = OwnDoor(
            doors_of(settings.api_url, place.common, place.protect),
            settings,
            self.counters,
            listening=self._endpoints,
            refuse=self._refuse_server,
            routes=OpenRoutes(
                self.registry,
                self.counters,
                note=self.connections.note,
                relays=lambda client, server: relays(handlers.layer_of(client), server),
                cut_server=handlers.cut_server,
                cut_client=partial(cut, handlers.transport, why="destination blocked"),
            ),
        )

    def _bound(self) -> None:
        """How many, and how long."""
        settings, counters, handlers = self.settings, self.counters, self.handlers
        self.limits = Limits(
            settings, self.registry, self.connections, counters, farewell=self.farewell, workers=self._place.workers
        )
        self.timeouts = Timeouts(
            settings,
            self.registry,
            self.connections,
            counters,
            cut=handlers.cut_server,
            silent_for=handlers.silent_for,
        )
        self.pass_through = PassThrough(settings, counters)

    def in_order(self) -> list[Any]:
        """The addons: their hooks run in this order."""
        blocks = self.settings.journal_policy == "block"
        return [
            self.closed,
            self.unsent,
            self.gate,  # before anything of a client is counted
            self.limits,
            self.connections,
            self.access,  # before anybody records, or sets a stream
            self.timeouts,
            self.pass_through,
            self.own_door,
            *([self.backpressure.messages] if blocks else []),
            self.websockets,  # before the recorder forgets a handshake
            _Before(self.recorder),
            *([self.backpressure] if blocks else []),
            Rules(self.rule_set, self.registry, self.counters),
            self.cache,  # behind what changes a request, before what streams and records a response
            self.streaming,
            StreamedRules(self.rule_set, self.registry, self.counters),
            self.recorder,
        ]

    def put_into_mitmproxy(self) -> None:
        observe(self.websockets)
        skip_interim()
        guard_heads(self.connections, self.limits.head_begun)
        mend(self.connections)
        fastpath.stand_in_front()
        connected = OpenConnections(self._proxyserver)
        self.recorder.arrived, self.recorder.was_reset = connected.arrived, connected.was_reset
        self._crash_watch = CrashWatch(connected, self.connections.crashed)

    def take_out_of_mitmproxy(self) -> None:
        stop_observing()
        self._crash_watch.stop()
        stop_mending()
        stop_guarding()
        stop_controlling()
        stop_skipping()

    def apply(self, settings: CaptureSettings) -> None:
        """From now on, while traffic flows."""
        self.gate.apply(settings)
        self.own_door.apply(settings)
        self.settings = self.access.settings = self.timeouts.settings = self.limits.settings = settings
        self.recorder.keep = Keep.of(settings)
        self.cache.apply(settings)
        self.pass_through.apply(settings)
        self.backpressure.seconds = settings.journal_wait
        self.websockets.enabled = settings.websocket_enabled and settings.logging_enabled
        self.websockets.max_message = settings.websocket_max_message

    def _endpoints(self) -> list[Endpoint]:
        return [Endpoint(host or "localhost", port) for host, port, *_ in self._proxyserver.listen_addrs()]

    def _refuse_server(self, client: connection.Client, server: connection.Server, why: str) -> None:
        self.connections.note(client, server, cause_of_message(why))
        self.handlers.abort_server(client, server)

    def _must_buffer(self, flow: http.HTTPFlow) -> bool:
        return self.rule_set.must_buffer(flow.request, content_length(flow.request.headers))


class _Before:
    """Opens the flow's state ahead of the addons that use it; the recorder itself ends it behind them."""

    name = "megido-recorder-open"

    def __init__(self, recorder: Recorder) -> None:
        self.requestheaders: Callable[[http.HTTPFlow], None] = recorder.open
