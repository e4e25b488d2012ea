"""The node's heartbeat on `megido.nodes`, and the figures that it and `/metrics` show."""

import os
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megido_capture.counters import Counters
from megido_capture.recording.emitter import Emitter
from megido_capture.recording.state import Registry
from megido_shared.bus.local.journal import DROP_REASONS
from megido_shared.clock import Clock
from megido_shared.events import NodeStatus

EVERY = 5.0
"""Seconds between two heartbeats."""


class Config(NamedTuple):
    """The version that is applied, whether it is out of date, and why a newer one is not applied."""

    version: int
    stale: bool
    error: str


type State = Literal["started", "running", "stopping"]


class Heartbeat:
    def __init__(
        self,
        emitter: Emitter,
        counters: Counters,
        clock: Clock,
        *,
        listen: Callable[[], str],
        config: Callable[[], Config],
        pinned: Callable[[], dict[str, str]],
    ) -> None:
        self._emitter = emitter
        self._counters = counters
        self._clock = clock
        self._listen = listen
        self._config = config
        self._pinned = pinned
        self._version = _version()
        self._next = 0.0

    def tick(self, now: float) -> None:
        if now >= self._next:
            self._next = now + EVERY
            self.beat("running")

    def soon(self) -> None:
        """With the next tick: something that others wait for has changed."""
        self._next = 0.0

    def beat(self, state: State) -> None:
        config = self._config()
        counters = {**self._counters, **self._emitter.journal.figures()}
        self._emitter.write(
            NodeStatus(
                **self._emitter.stamp(self._clock.time_us()),
                state=state,
                version=self._version,
                pid=os.getpid(),
                listen=self._listen(),
                config_version=config.version,
                config_stale=config.stale,
                config_error=config.error[:500],
                pinned=self._pinned(),
                counters=counters,
                captured=self._emitter.journal.last_seq,
            )
        )


class Figures(Collector):
    """Read on each scrape, from the counters that hooks advance: nothing is added to the proxy's own path."""

    def __init__(self, emitter: Emitter, counters: Counters, registry: Registry, config: Callable[[], Config]) -> None:
        self._emitter = emitter
        self._counters = counters
        self._registry = registry
        self._config = config

    def collect(self) -> Iterable[Metric]:
        captured = CounterMetricFamily("megido_capture_records", "Terminal records written by this node, by its count")
        captured.add_metric([], self._emitter.journal.last_seq)
        yield captured
        journal = self._emitter.journal
        dropped = CounterMetricFamily(
            "megido_capture_dropped", "Records that the journal could not take, by reason", labels=["reason"]
        )
        for reason in DROP_REASONS:
            dropped.add_metric([reason], journal.drops[reason])
        yield dropped
        events = CounterMetricFamily("megido_capture_events", "What hooks counted, by name", labels=["name"])
        for name, value in list(self._counters.items()):
            events.add_metric([name], value)
        yield events
        config = self._config()
        for name, what, number in (
            ("megido_capture_config_version", "The configuration that is applied", config.version),
            ("megido_capture_config_stale", "1 while it could not be read for longer than cache_ttl", config.stale),
            ("megido_capture_config_refused", "1 while a newer one cannot be applied", bool(config.error)),
            ("megido_capture_open_flows", "Flows that have not ended", len(self._registry.flows)),
            ("megido_capture_client_connections", "Open client connections", len(self._registry.clients)),
            ("megido_capture_journal_bytes", "Size of the journal that is not freed yet", journal.used_bytes),
            ("megido_capture_journal_cap_bytes", "Size at which the journal takes no more", journal.cap_bytes),
        ):
            gauge = GaugeMetricFamily(name, what)
            gauge.add_metric([], number)
            yield gauge


def _version() -> str:
    try:
        return version("megido")
    except PackageNotFoundError:
        return ""
