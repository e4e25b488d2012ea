"""SQL of the payload rules."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    and_,
    any_,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api import paging
from megido_shared.db.tables import nodes, payload_rules

ORDERINGS = ("id", "name", "active", "created_at", "updated_at", "hits")

_c = payload_rules.c


class Trouble(NamedTuple):
    """How often a rule failed, and how often it was left out because a body was too large for it."""

    errors: int = 0
    skipped: int = 0


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


async def active_count(connection: AsyncConnection) -> int:
    return int(await connection.scalar(select(func.count()).select_from(payload_rules).where(_c.active)) or 0)


async def troubles(connection: AsyncConnection) -> dict[int, Trouble]:
    """By rule, what nodes counted since their starts; of those that were heard of in the last day."""
    entry = func.jsonb_each_text(nodes.c.counters).table_valued("key", "value").render_derived()
    kind, number = func.split_part(entry.c.key, ":", 1), func.split_part(entry.c.key, ":", 2)
    query = (
        select(kind, number, func.sum(cast(entry.c.value, BigInteger)))
        .select_from(nodes.join(entry, true()))
        .where(kind.in_(("rule_errors", "rule_skipped")), nodes.c.seen_at > func.now() - timedelta(days=1))
        .group_by(kind, number)
    )
    found: dict[int, Trouble] = {}
    for name, rule, count in await connection.execute(query):
        known = found.get(int(rule), Trouble())
        found[int(rule)] = known._replace(**{name.removeprefix("rule_"): int(count)})
    return found
