"""Puts the current snapshot on the bus: at the start, after each change, and whenever the bus has another."""

import asyncio
import logging
from contextlib import suppress

import msgspec
from psycopg import Error as PsycopgError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from megido_api.rules import queries
from megido_shared.bus.base import Bus
from megido_shared.config import Snapshot, decode_snapshot, encode_snapshot
from megido_shared.errors import Unavailable

_BUS_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class RulesPublisher:
    """Postgres is the truth; with the bus or Postgres away it tries again until they agree."""

    def __init__(self, engine: AsyncEngine, bus: Bus, *, check_s: float = 60.0, retry_s: float = 1.0) -> None:
        self._engine = engine
        self._bus = bus
        self._check_s = check_s
        self._retry_s = retry_s
        self._wake = asyncio.Event()
        self._failing = False

    def wake(self) -> None:
        """A change was committed."""
        self._wake.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.publish()
                self._failing = False
            except (Unavailable, TimeoutError, SQLAlchemyError, PsycopgError, OSError) as error:
                if not self._failing:
                    _log.warning("rules: cannot publish now, will keep trying: %s", str(error).partition("\n")[0])
                self._failing = True
                await asyncio.sleep(self._retry_s)
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._check_s)

    async def publish(self) -> int:
        """Makes the bus hold what Postgres holds; returns the version. One publisher at a time, whatever the
        number of APIs."""
        while True:
            async with self._engine.begin() as connection, asyncio.timeout(_BUS_TIMEOUT_S):
                await queries.lock_publishing(connection)
                current = _decode(await self._bus.get_config(queries.SCOPE))
                wanted = await queries.snapshot(connection)
                if wanted is not None and not _hides(current, wanted):
                    if wanted != current:
                        await self._bus.put_config(queries.SCOPE, encode_snapshot(wanted))
                    return wanted.version
                # Committed before anything is published: a version must never be given twice.
                await queries.raise_version(connection, at_least=current.version + 1 if current else 1)


def _hides(current: Snapshot | None, wanted: Snapshot) -> bool:
    """Whether proxies, which take only risen versions, would not take the wanted snapshot after the current one:
    a new database under an old bus."""
    return current is not None and current != wanted and current.version >= wanted.version


def _decode(raw: bytes | None) -> Snapshot | None:
    """A value that nobody can read counts as none: it is replaced."""
    if raw is None:
        return None
    try:
        return decode_snapshot(raw)
    except msgspec.DecodeError:
        _log.warning("rules: the bus holds a snapshot that cannot be read; it is replaced")
        return None
