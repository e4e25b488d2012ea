"""Which configuration a node works under, and how another takes its place."""

from collections.abc import Callable
from functools import partial

from megido_capture.configuration.live import LiveConfiguration
from megido_capture.configuration.settings import CaptureSettings
from megido_capture.configuration.source import ConfigSource
from megido_capture.heartbeat import Config
from megido_capture.node.parts import Parts, Place
from megido_shared.bus.base import Bus
from megido_shared.bus.local import Journal, group_is_live
from megido_shared.bus.local.config import ConfigFiles
from megido_shared.settings import MIN_JOURNAL_CAP, Common

INGEST_GROUP = "ingest"
"""The consumer group whose live members say that an API publishes on this data directory's bus."""


class InForce:
    """`source` brings what is published to `live`, which decides; here it becomes what the parts do."""

    def __init__(self, live: LiveConfiguration, parts: Parts, journal: Journal, place: Place) -> None:
        self.told: list[Callable[[], None]] = []
        """Called when a version is in force."""
        self._live = live
        self._parts = parts
        self._journal = journal
        self._place = place
        self._version = 0
        self.source = ConfigSource(
            live,
            open_bus=partial(_open_bus, place.common),
            bus_is_fed=partial(_bus_is_fed, place.common),
            api_url=live.settings.api_url,
            source_app=live.settings.source_app,
            node=journal.node,
            cache_ttl=live.settings.cache_ttl,
        )
        live.put_in_force = self._apply

    def begin(self) -> None:
        """Nobody is served yet, and nobody is without the rules."""
        self._apply_settings()
        self._parts.rule_set.replace(self._live.rules)
        self._applied(self._live.version)

    def config(self) -> Config:
        return Config(self._version, self.source.stale, self._live.error)

    def _apply(self) -> None:
        """While traffic flows."""
        self._apply_settings()  # access first: patterns may take a second to compile
        self._parts.rule_set.load(self._live.rules, partial(self._applied, self._live.version))

    def _apply_settings(self) -> None:
        settings = self._live.settings
        self._parts.apply(settings)
        self._journal.cap_bytes = journal_cap(settings, self._place.workers)
        self.source.cache_ttl = settings.cache_ttl

    def _applied(self, version: int) -> None:
        """That version's settings and rules are in force."""
        self._version = version
        for tell in self.told:
            tell()


def journal_cap(settings: CaptureSettings, workers: int) -> int:
    """Bytes. The data directory's disk is one: each worker's journal has its part of it."""
    return max(MIN_JOURNAL_CAP, settings.journal_cap_bytes // workers)


def read_local_bus(live: LiveConfiguration, common: Common) -> None:
    """At once, in place of a tenth of a second after the first client."""
    if not common.kafka:
        files = ConfigFiles(common.data_dir.config)
        for scope in live.scopes:
            if (raw := files.get(scope)) is not None:
                live.take(scope, raw)


def _open_bus(common: Common) -> Bus:
    from megido_shared.bus.open import open_bus  # noqa: PLC0415 - loads the Kafka client where it is used

    return open_bus(common)


def _bus_is_fed(common: Common) -> bool:
    return bool(common.kafka) or group_is_live(common.data_dir, INGEST_GROUP)
