"""Puts the current snapshots on the bus: at the start, after each change, and whenever the bus has others."""

import asyncio
import logging
from collections.abc import Mapping

import msgspec
from psycopg import Error as PsycopgError
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_api import imports
from megido_api.snapshots import GLOBAL, lock_changes, raise_version, snapshots
from megido_shared.bus.base import Bus
from megido_shared.config import Snapshot, decode_snapshot, encode_snapshot
from megido_shared.config_fields import given
from megido_shared.errors import Unavailable

_BUS_TIMEOUT_S = 10.0
MAX_RECORD_BYTES = 4_000_000
"""Below `max.message.bytes`, with what Kafka adds. Only what was stored before sizes were checked is larger."""
_PUBLISH_LOCK = 0x4D45_4749_444F_0001

_log = logging.getLogger(__name__)


class SnapshotPublisher:
    """Postgres is the truth; with the bus or Postgres away it tries again until they agree."""

    def __init__(self, engine: AsyncEngine, bus: Bus, *, check_s: float = 60.0, retry_s: float = 1.0) -> None:
        self._engine = engine
        self._bus = bus
        self._check_s = check_s
        self._retry_s = retry_s
        self._wake = asyncio.Event()
        self._failing = False
        self._seen: dict[str, Snapshot] = {}
        """What the bus had when it was last looked at. Only a change, or the next check, looks again."""

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
                    _log.warning(
                        "configuration: cannot publish now, will keep trying: %s", str(error).partition("\n")[0]
                    )
                self._failing = True
                await asyncio.sleep(self._retry_s)
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), self._check_s)
            except TimeoutError:
                self._seen.clear()

    async def publish(self) -> None:
        """Makes the bus hold what Postgres holds. One publisher at a time, whatever the number of APIs."""
        while True:
            async with self._engine.begin() as connection, asyncio.timeout(_BUS_TIMEOUT_S):
                await _lock(connection)
                wanted = {snapshot.scope: snapshot for snapshot in await snapshots(connection)}
                new = [snapshot for scope, snapshot in wanted.items() if self._seen.get(scope) != snapshot]
                if GLOBAL in wanted and not new:
                    return
                on_bus = _decoded(await self._bus.get_configs())
                if GLOBAL not in wanted:
                    await self._begin(connection, on_bus)
                    continue
                hidden: dict[str, int] = {}
                for snapshot in new:
                    hidden |= await self._put(snapshot, on_bus.get(snapshot.scope))
                if not hidden:
                    return
                # Committed before anything is published: a version must never be given twice.
                for scope, version in hidden.items():
                    await raise_version(connection, scope, at_least=version + 1)

    async def _begin(self, connection: AsyncConnection, on_bus: Mapping[str, Snapshot]) -> None:
        """The first version of a database that nobody has written. What the bus has outlived the database before it:
        it becomes the truth again, all scopes of it, for no settings at all would open every proxy."""
        await lock_changes(connection)
        known = {snapshot.scope for snapshot in await snapshots(connection)}
        if GLOBAL in known:
            return  # somebody changed the configuration meanwhile, and that is what was wanted last
        told = [
            found for found in on_bus.values() if found.scope not in known and (found.rules or given(found.settings))
        ]
        # In the order of their versions: these are counted over all scopes, and so are the new ones.
        for found in sorted(told, key=lambda found: found.version):
            version = await imports.take_over(connection, found)
            _log.warning(
                "configuration: the database is new and the bus has version %d of %s from an older one: its settings "
                "and %d rules are taken over as version %d",
                found.version,
                found.scope,
                len(found.rules),
                version,
            )
        if not any(found.scope == GLOBAL for found in told):
            empty = on_bus.get(GLOBAL)
            await raise_version(connection, GLOBAL, at_least=1 if empty is None else empty.version + 1)

    async def _put(self, wanted: Snapshot, current: Snapshot | None) -> dict[str, int]:
        """Puts it on the bus, which has `current`. The version that keeps proxies from taking it, by its scope; empty
        when they will."""
        if current is not None and _hides(current, wanted):
            return {wanted.scope: current.version}
        if current != wanted:
            raw = encode_snapshot(wanted)
            if len(raw) > MAX_RECORD_BYTES:
                _log.error(
                    "configuration: version %d of %s is %d bytes, more than a record may have: proxies keep the one "
                    "before. Deactivate payload rules",
                    wanted.version,
                    wanted.scope,
                    len(raw),
                )
            else:
                await self._bus.put_config(wanted.scope, raw)
        self._seen[wanted.scope] = wanted
        return {}


async def _lock(connection: AsyncConnection) -> None:
    """Until the transaction's end: an older snapshot must not be put after a newer one."""
    await connection.execute(select(func.pg_advisory_xact_lock(_PUBLISH_LOCK)))


def _hides(current: Snapshot, wanted: Snapshot) -> bool:
    """Whether proxies, which take only risen versions, would not take the wanted snapshot after the current one:
    a new database under an old bus."""
    return current != wanted and current.version >= wanted.version


def _decoded(on_bus: Mapping[str, bytes]) -> dict[str, Snapshot]:
    """A value that nobody can read, or that is of another scope, counts as none: it is replaced."""
    found = {}
    for scope, raw in on_bus.items():
        try:
            snapshot = decode_snapshot(raw)
            if snapshot.scope != scope:
                raise msgspec.ValidationError("it is of another scope")
        except msgspec.DecodeError as error:
            _log.warning("configuration: the bus holds a snapshot of %.200r that cannot be read: %s", scope, error)
        else:
            found[scope] = snapshot
    return found
