"""SQL of the payload rules and of the version of their snapshot."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, any_, delete, func, insert, literal, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_shared.config import PayloadRule, Snapshot
from megido_shared.db.tables import config_snapshots, payload_rules

SCOPE = "global"
ORDERINGS = ("id", "name", "active", "created_at", "updated_at", "hits")
MAX_SNAPSHOT_BYTES = 600_000
"""Of the active rules' texts: a snapshot is one record on the bus."""

_PUBLISH_LOCK = 0x4D45_4749_444F_0001
_c = payload_rules.c


async def listed(connection: AsyncConnection, search: str | None, ordering: Sequence[str]) -> Sequence[Row[Any]]:
    """`ordering` holds names of ORDERINGS, descending with a leading `-`; then newest first."""
    query = select(payload_rules)
    if search:
        pattern = paging.contains(search)
        texts = (_c.name, _c.target_url_pattern, _c.injection_point, _c.payload_content)
        query = query.where(or_(*(column.ilike(pattern, escape="\\") for column in texts)))
    order = [_c[name.removeprefix("-")].desc() if name.startswith("-") else _c[name] for name in ordering]
    return (await connection.execute(query.order_by(*order, _c.id.desc()))).all()


async def active(connection: AsyncConnection, source_app: str | None) -> Sequence[Row[Any]]:
    conditions: list[ColumnElement[bool]] = [_c.active]
    if source_app:
        conditions.append(or_(func.cardinality(_c.target_apps) == 0, literal(source_app) == any_(_c.target_apps)))
    return (await connection.execute(select(payload_rules).where(and_(*conditions)).order_by(_c.id))).all()


async def one(connection: AsyncConnection, rule_id: int, *, lock: bool = False) -> Row[Any] | None:
    query = select(payload_rules).where(_c.id == rule_id)
    return (await connection.execute(query.with_for_update() if lock else query)).first()


async def create(connection: AsyncConnection, values: Mapping[str, Any]) -> Row[Any]:
    now = datetime.now(UTC)
    given = {"created_by": "", "hits": 0, "created_at": now, "updated_at": now, **values}
    row: Row[Any] = (await connection.execute(insert(payload_rules).values(given).returning(payload_rules))).one()
    return row


async def change(connection: AsyncConnection, rule_id: int, values: Mapping[str, Any]) -> Row[Any] | None:
    given = {"updated_at": datetime.now(UTC), **values}
    query = update(payload_rules).where(_c.id == rule_id).values(given).returning(payload_rules)
    row: Row[Any] | None = (await connection.execute(query)).first()
    return row


async def remove(connection: AsyncConnection, rule_id: int) -> bool:
    found = await connection.execute(delete(payload_rules).where(_c.id == rule_id).returning(_c.id))
    return found.first() is not None


async def raise_version(connection: AsyncConnection, at_least: int = 1) -> int:
    """The version of the change that this transaction makes. Its row's lock puts changes in one order."""
    now = datetime.now(UTC)
    row = {"scope": SCOPE, "version": at_least, "settings": {}, "updated_at": now}
    current = config_snapshots.c.version
    query = (
        upsert(config_snapshots)
        .values(row)
        .on_conflict_do_update(
            index_elements=[config_snapshots.c.scope],
            set_={"version": func.greatest(current + 1, at_least), "updated_at": now},
        )
        .returning(current)
    )
    return int((await connection.execute(query)).scalar_one())


async def active_bytes(connection: AsyncConnection) -> int:
    """About how large a snapshot of the active rules is."""
    texts = _c.name + _c.target_url_pattern + _c.injection_point + _c.payload_content
    apps = func.array_to_string(_c.target_apps, ",")
    size = func.coalesce(func.sum(func.octet_length(texts) + func.octet_length(apps)), 0)
    return int(await connection.scalar(select(size).where(_c.active)) or 0)


async def lock_publishing(connection: AsyncConnection) -> None:
    """Until the transaction's end: an older snapshot must not be put after a newer one."""
    await connection.execute(select(func.pg_advisory_xact_lock(_PUBLISH_LOCK)))


async def snapshot(connection: AsyncConnection) -> Snapshot | None:
    """The version and the rules of one moment (one statement); None before the first version."""
    query = (
        select(config_snapshots.c.version, payload_rules)
        .select_from(config_snapshots.outerjoin(payload_rules, _c.active))
        .where(config_snapshots.c.scope == SCOPE)
        .order_by(_c.id)
    )
    rows = (await connection.execute(query)).all()
    if not rows:
        return None
    rules = tuple(_rule(row) for row in rows if row.id is not None)
    return Snapshot(scope=SCOPE, version=rows[0].version, rules=rules)


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
