"""The configuration as Postgres holds it: settings by scope, one count of versions, and the snapshots for proxies."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy import Row, func, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.problems import Problem
from megido_shared.config import PayloadRule, ProxySettings, Snapshot, encode_snapshot
from megido_shared.config_fields import given
from megido_shared.db.tables import config_changes, config_snapshots, payload_rules

GLOBAL = "global"
MAX_SNAPSHOT_BYTES = 600_000
"""Of an encoded snapshot. A record may be six times as large; every proxy keeps one."""

_CHANGE_LOCK = 0x4D45_4749_444F_0002
_scopes = config_snapshots.c
_rules = payload_rules.c


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What a scope says itself. Version 0: nothing yet."""

    scope: str
    version: int = 0
    settings: ProxySettings = ProxySettings()
    updated_at: datetime | None = None


async def lock_changes(connection: AsyncConnection) -> None:
    """Until the transaction's end: changes are in one order, whatever they change."""
    await connection.execute(select(func.pg_advisory_xact_lock(_CHANGE_LOCK)))


async def raise_version(
    connection: AsyncConnection, scope: str, *, at_least: int = 1, settings: ProxySettings | None = None
) -> int:
    """The version of the change that this transaction makes; versions are counted over all scopes together, so that
    a higher one is always a later one. `settings` replace those of the scope."""
    await lock_changes(connection)
    highest = await connection.scalar(select(func.max(_scopes.version)))
    version = max((highest or 0) + 1, at_least)
    values = {"version": version, "updated_at": datetime.now(UTC)}
    if settings is not None:
        values["settings"] = given(settings)
    query = upsert(config_snapshots).values({"scope": scope, "settings": {}} | values)
    await connection.execute(query.on_conflict_do_update(index_elements=[_scopes.scope], set_=values))
    return version


async def record(
    connection: AsyncConnection, version: int, scope: str, changes: Mapping[str, Any], changed_by: str
) -> None:
    """The audit of a change. `changes`: by field what was and what is; never a secret."""
    values = {"version": version, "scope": scope, "changes": dict(changes), "changed_by": changed_by}
    await connection.execute(insert(config_changes).values(values | {"changed_at": datetime.now(UTC)}))


async def check_size(connection: AsyncConnection, scope: str) -> None:
    """Raises Problem (400) when the scope's snapshot has become too large: it is one record on the bus."""
    for snapshot in await snapshots(connection, [scope]):
        size = len(encode_snapshot(snapshot))
        if size > MAX_SNAPSHOT_BYTES:
            raise Problem(
                400,
                "too_many_rules" if snapshot.rules else "too_large",
                f"the configuration of {scope} with its active rules would be {size} bytes as it is published; "
                f"{MAX_SNAPSHOT_BYTES} are allowed",
            )


async def stored(connection: AsyncConnection, scope: str) -> Stored:
    row = (await connection.execute(select(config_snapshots).where(_scopes.scope == scope))).first()
    return Stored(scope=scope) if row is None else _stored(row)


async def all_stored(connection: AsyncConnection) -> list[Stored]:
    rows = await connection.execute(select(config_snapshots).order_by(_scopes.scope))
    return [_stored(row) for row in rows]


async def snapshots(connection: AsyncConnection, only: Sequence[str] = ()) -> list[Snapshot]:
    """What proxies get, of one moment (one statement), `only` of some scopes or of all. The rules are in the global
    one; each names its applications itself."""
    query = (
        select(
            _scopes.scope.label("snapshot_scope"),
            _scopes.version.label("snapshot_version"),
            _scopes.settings.label("snapshot_settings"),
            payload_rules,
        )
        .select_from(config_snapshots.outerjoin(payload_rules, _rules.active & (_scopes.scope == GLOBAL)))
        .order_by(_scopes.scope, _rules.id)
    )
    if only:
        query = query.where(_scopes.scope.in_(only))
    found: dict[str, Snapshot] = {}
    rules: dict[str, list[PayloadRule]] = {}
    for row in await connection.execute(query):
        scope = row.snapshot_scope
        if scope not in found:
            settings = _settings(row.snapshot_settings)
            found[scope] = Snapshot(scope=scope, version=row.snapshot_version, settings=settings)
        if row.id is not None:
            rules.setdefault(scope, []).append(_rule(row))
    return [msgspec.structs.replace(snapshot, rules=tuple(rules.get(scope, ()))) for scope, snapshot in found.items()]


def _stored(row: Row[Any]) -> Stored:
    return Stored(scope=row.scope, version=row.version, settings=_settings(row.settings), updated_at=row.updated_at)


def _settings(document: Any) -> ProxySettings:
    return msgspec.convert(document, ProxySettings)


def _rule(row: Row[Any]) -> PayloadRule:
    return PayloadRule(
        id=row.id,
        name=row.name,
        target_url_pattern=row.target_url_pattern,
        injection_type=row.injection_type,
        injection_point=row.injection_point,
        payload_content=row.payload_content,
        target_apps=tuple(row.target_apps),
    )
