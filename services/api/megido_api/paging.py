"""Pages of lists: keyset beside the founding document's offset, and totals that never count a whole table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncConnection

COUNT_CAP = 10_000
"""A total past this is not counted."""


@dataclass(frozen=True, slots=True)
class Total:
    """`exact` is False when there are more than `count`, or when `count` is an estimate."""

    count: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Page:
    """`more`: whether rows follow the last one."""

    rows: Sequence[Row[Any]]
    more: bool


async def fetch(connection: AsyncConnection, query: Select[Any], limit: int, offset: int = 0) -> Page:
    """One row more than asked for is read, to know whether there is a next page."""
    rows = (await connection.execute(query.limit(limit + 1).offset(offset))).all()
    return Page(rows[:limit], more=len(rows) > limit)


async def count(connection: AsyncConnection, query: Select[Any]) -> Total:
    """How many rows `query` selects, counted up to the cap. `query` is without order and limit."""
    capped = (
        query.with_only_columns(literal_column("1"), maintain_column_froms=True)
        .order_by(None)
        .limit(COUNT_CAP + 1)
        .subquery()
    )
    found = await connection.scalar(select(func.count()).select_from(capped)) or 0
    return Total(min(found, COUNT_CAP), exact=found <= COUNT_CAP)


def contains(text: str) -> str:
    """A LIKE pattern (escape character `\\`) for a substring."""
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"
