"""The addon of `cache_enabled`: answers requests for static assets from memory.

What does it is loaded when the cache is turned on, and gone with all that it holds when it is turned off.
"""

from typing import TYPE_CHECKING

from mitmproxy import http

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_capture.recording.state import Registry

if TYPE_CHECKING:
    from megido_capture.cache.static import StaticCache


_HOOKS = frozenset(("request", "responseheaders", "response", "error"))


class Cache:
    """Stands behind access control and payload rules, and before what streams and records."""

    name = "megido-cache"

    def __init__(self, registry: Registry, counters: Counters, settings: CaptureSettings) -> None:
        self.counters = counters
        self._registry = registry
        self._cache: StaticCache | None = None
        self._was_on = False
        self._blocked = settings.blocked_destinations
        self.apply(settings)

    def apply(self, settings: CaptureSettings) -> None:
        """Turns it on or off. It starts empty where other destinations are blocked: that is checked at the connect,
        which an answer from the cache does without."""
        if not settings.cache_enabled:
            self._cache = None
        elif self._cache is None or self._blocked != settings.blocked_destinations:
            from megido_capture.cache.static import StaticCache  # noqa: PLC0415 - it costs the start 60 ms

            self._cache = StaticCache(self.counters)
            self._was_on = True
        self._blocked = settings.blocked_destinations

    @property
    def idle_hooks(self) -> frozenset[str]:
        """See `Dispatcher`. None once it has been on: what was asked of a server then may be answered later."""
        return frozenset() if self._was_on else _HOOKS

    @contained
    def request(self, flow: http.HTTPFlow) -> None:
        if self._cache is not None and (state := self._registry.flows.get(flow.id)):
            self._cache.request(flow, state)

    @contained
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        if self._cache is not None and (state := self._registry.flows.get(flow.id)):
            self._cache.responseheaders(flow, state)

    @contained
    def response(self, flow: http.HTTPFlow) -> None:
        state = self._registry.flows.get(flow.id)
        if state is not None and state.fetch is not None:
            from megido_capture.cache.static import answered  # noqa: PLC0415 - loaded: it made the fetch

            # What was asked for under other settings is not kept under these: it may lead where nobody may go now.
            answered(flow, state, state.fetch, self._cache if state.fetch.of is self._cache else None)

    @contained
    def error(self, flow: http.HTTPFlow) -> None:
        state = self._registry.flows.get(flow.id)
        if state is not None and state.fetch is not None:
            state.fetch.restore(flow.request)
