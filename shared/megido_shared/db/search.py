"""Pages of flows by any conditions, newest first, fast whether many flows match or few.

`ORDER BY flow_id DESC LIMIT n` is fast by walking the newest flows when many match, and by an index when few do. The
planner guesses which, from statistics that know neither what occurs together nor what substrings occur, and a wrong
guess reads the whole table. So it is not asked: the newest thousand flows are looked through, which is always
cheap; only what they do not answer is sought by the indexes, in windows of days that grow as they turn out empty, each
without the LIMIT that would tempt the planner to walk.

Conditions are on `flows`. Besides, trigram indexes may find candidates: by `line`, a condition on `flow_lines` that
selects no less than the conditions do (what it finds is checked by them, and what is not indexed yet is looked at in
`flows`; all flows are, while the index is far behind); or by `text`, one on `flow_text` that has to hold as well, so
that only what is indexed is found.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Row, Select, any_, func, literal, literal_column, select, union
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared import ids
from megido_shared.db.tables import LINE_INDEX, feed, feed_cursors, flow_lines, flow_text, flows

WALK = 1_000
"""Flows that are looked through first: a millisecond or two."""
_LONG_WALK = 20_000
_WORTH = 0.01
"""A share of matches among those from which on walking further is cheaper than seeking."""
_WALK_TEXT, _WORTH_TEXT = 300, 0.03
"""The same where texts are read: each takes ten times as long as a row."""
_CANDIDATES = 1_000
_DEEPEST = 2_000
"""Rows to skip past which the planner is asked after all: an offset costs what it skips, however it is found."""
FAR_BEHIND = 5_000
"""Batches that are not indexed, past which looking at them one by one is no better than looking at all flows."""
_LOWEST = uuid.UUID(int=0)


@dataclass(frozen=True, slots=True)
class Search:
    """What is wanted: `where` all hold; `before` and `after` (exclusive) bound the ids; `line`, `text`: see the module.

    `earlier`: flows at or above this id seldom match (they are newer than the time asked for, and only what was posted
    or imported has a time that its id does not tell): these are sought, and looking through begins here."""

    where: Sequence[ColumnElement[bool]] = ()
    line: ColumnElement[bool] | None = None
    text: ColumnElement[bool] | None = None
    before: uuid.UUID | None = None
    after: uuid.UUID | None = None
    earlier: uuid.UUID | None = None


type Rows = list[Row[Any]]


async def newest(
    connection: AsyncConnection, columns: Sequence[ColumnElement[Any]], search: Search, limit: int, offset: int = 0
) -> Rows:
    """Up to `limit` rows of `columns` (`flow_id` among them), newest first, after `offset` of them."""
    wanted = limit + offset
    if (not search.where and search.text is None) or offset > _DEEPEST:
        query = select(*columns).where(*_where(search), *_bounds(search.before, search.after))
        return list((await connection.execute(_ordered(query, limit).offset(offset))).all())
    return (await _Finder(connection, columns, search, wanted).run())[offset:wanted]


class _Finder:
    def __init__(
        self, connection: AsyncConnection, columns: Sequence[ColumnElement[Any]], search: Search, wanted: int
    ) -> None:
        self._connection = connection
        self._query = select(*columns).where(*_where(search))
        self._candidates = select(*columns).where(*search.where)
        self._search = search
        self._wanted = wanted
        self._found: Rows = []
        self._below = search.before  # all newer than this is looked through
        self._line = search.line

    async def run(self) -> Rows:
        earlier = self._search.earlier
        if earlier is not None and (self._below is None or earlier < self._below):
            self._found += await self._unordered(
                [*_bounds(self._below, self._search.after), flows.c.flow_id >= earlier]
            )
            self._below = earlier
            if not self._missing:
                return self._found
        by_text = self._search.text is not None
        walked = max(min(WALK, _WALK_TEXT) if by_text else WALK, 3 * self._wanted)
        if await self._walk(walked):
            return self._found
        share = len(self._found) / walked
        if share >= (_WORTH_TEXT if by_text else _WORTH):
            rest = int(min(_LONG_WALK, 1.5 * (self._wanted - len(self._found)) / share))
            if await self._walk(rest):
                return self._found
        return await self._seek()

    async def _walk(self, count: int) -> bool:
        """Looks through the next `count` flows, whatever they are. True when there is nothing more to find."""
        lowest = await self._connection.scalar(
            _ordered(select(flows.c.flow_id).where(*_bounds(self._below, self._search.after)), 1).offset(count)
        )
        query = self._query.where(*_bounds(self._below, self._search.after), flows.c.flow_id >= (lowest or _LOWEST))
        self._found += (await self._connection.execute(_ordered(query, self._missing))).all()
        self._below = lowest
        return lowest is None or not self._missing

    @property
    def _missing(self) -> int:
        return self._wanted - len(self._found)

    async def _seek(self) -> Rows:
        assert self._below is not None
        after = self._search.after
        lowest = await self._connection.scalar(
            select(flows.c.flow_id).where(*_bounds(None, after)).order_by(flows.c.flow_id).limit(1)
        )
        # Before the windows: what the index takes in meanwhile is found there as well.
        late = await self._not_indexed() if self._line is not None else []
        seen = {row.flow_id for row in late}
        upper = self._below
        days = 1
        while self._missing > 0 and lowest is not None and lowest < upper:
            lower = max(lowest, _days_before(upper, days))
            sought = [row for row in await self._window(lower, upper) if row.flow_id not in seen]
            here = [row for row in late if lower <= row.flow_id < upper]
            found = sorted([*sought, *here], key=lambda row: row.flow_id, reverse=True)[: self._missing]
            self._found += found
            upper = lower
            days = _next_window(days, len(found), self._missing)
        return self._found

    async def _window(self, lower: uuid.UUID, upper: uuid.UUID) -> Rows:
        bounds = [flows.c.flow_id >= lower, flows.c.flow_id < upper]
        indexed: list[Select[Any]] = []
        for table, condition in ((flow_lines, self._line), (flow_text, self._search.text)):
            if condition is not None:
                query = select(table.c.flow_id).where(condition, table.c.flow_id >= lower, table.c.flow_id < upper)
                indexed.append(query)
        if len(indexed) == 1:
            # Apart, because planning a join of partitioned tables takes longer than finding a few candidates.
            inner = indexed[0].offset(literal_column("0")).subquery()
            few = select(inner.c.flow_id).order_by(inner.c.flow_id.desc()).limit(_CANDIDATES)
            found = list((await self._connection.execute(few)).scalars())
            if not found:
                return []
            if len(found) < _CANDIDATES:
                return await self._unordered([*bounds, flows.c.flow_id.in_(found)], self._candidates)
        bounds += [flows.c.flow_id.in_(query) for query in indexed]
        return await self._unordered(bounds, self._candidates)

    async def _unordered(self, bounds: Sequence[ColumnElement[bool]], among: Select[Any] | None = None) -> Rows:
        """OFFSET 0 keeps order and limit outside: inside, the planner plans for all matches."""
        inner = (self._query if among is None else among).where(*bounds).offset(literal_column("0")).subquery()
        query = select(inner).order_by(inner.c.flow_id.desc()).limit(self._missing)
        return list((await self._connection.execute(query)).all())

    async def _not_indexed(self) -> Rows:
        """Matches in what `flow_lines` does not hold yet, or holds as it was before; far behind, it is not asked."""
        batches = await not_indexed(self._connection)
        if batches is None:
            self._line = None
        if not batches:
            return []
        return await self._unordered([_of(batches), *_bounds(self._below, self._search.after)])


async def not_indexed(connection: AsyncConnection) -> list[int] | None:
    """The batches that `flow_lines` does not hold yet: usually none. None when they are more than `FAR_BEHIND`. Asked
    for apart, because a planner that does not see how few they are reads all flows."""
    position = select(func.coalesce(func.max(feed_cursors.c.seq), 0)).where(feed_cursors.c.reader == LINE_INDEX)
    query = select(feed.c.batch_id).where(feed.c.seq > position.scalar_subquery()).order_by(feed.c.seq)
    found = list((await connection.execute(query.limit(FAR_BEHIND + 1))).scalars())
    return None if len(found) > FAR_BEHIND else found


def _of(batches: list[int]) -> ColumnElement[bool]:
    """As one parameter: a statement has 65,535 at most."""
    return flows.c.batch_id == any_(literal(batches, ARRAY(BigInteger)))


def _where(search: Search) -> list[ColumnElement[bool]]:
    """The conditions, without the help of an index on lines."""
    found = list(search.where)
    if search.text is not None:
        # OFFSET 0: asked of each flow that is looked through, not joined with all that match.
        texts = select(flow_text.c.flow_id).where(flow_text.c.flow_id == flows.c.flow_id, search.text)
        found.append(texts.offset(literal_column("0")).exists())
    return found


def _ordered(query: Select[Any], limit: int) -> Select[Any]:
    return query.order_by(flows.c.flow_id.desc()).limit(limit)


def _bounds(before: uuid.UUID | None, after: uuid.UUID | None) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if before is not None:
        found.append(flows.c.flow_id < before)
    if after is not None:
        found.append(flows.c.flow_id > after)
    return found


def _next_window(days: int, found: int, missing: int) -> int:
    """How many days to look at next, after `days` of them held `found`: as many as it should take, and twice as many
    at least, because each asking costs something too."""
    if not found:
        return 8 * days
    return max(2 * days, int(1.5 * days * missing / found))


def _days_before(flow_id: uuid.UUID, days: int) -> uuid.UUID:
    """The first id of the day that is `days` - 1 before the day of the newest id below `flow_id`."""
    newest = uuid.UUID(int=flow_id.int - 1)
    day = ids.day_of(newest.bytes) if newest.int >> 80 else datetime(1970, 1, 1, tzinfo=UTC)
    if (day - datetime(1970, 1, 1, tzinfo=UTC)).days < days:
        return _LOWEST
    return ids.floor_id(day - timedelta(days=days - 1))


@dataclass(frozen=True, slots=True)
class Count:
    """`exact` is False when more may match than `number`."""

    number: int
    exact: bool


async def count(connection: AsyncConnection, search: Search, cap: int) -> Count:
    """How many match, counted up to `cap`. While `flow_lines` is far behind, those of the newest flows and those that
    it knows."""
    matching = select(flows.c.flow_id).where(*search.where, *_bounds(search.before, search.after))
    parts = [matching]
    behind = False
    if search.text is not None:
        parts = [matching.where(flows.c.flow_id.in_(select(flow_text.c.flow_id).where(search.text)))]
    if search.line is not None:
        late = await not_indexed(connection)
        behind = late is None
        parts = [matching.where(flows.c.flow_id.in_(select(flow_lines.c.flow_id).where(search.line)))]
        if late is None:
            parts.append(matching.where(flows.c.flow_id >= await _lowest_of_walk(connection, search)))
        elif late:
            parts.append(matching.where(_of(late)))
    capped = union(*(part.limit(cap) for part in parts)).limit(cap) if parts[1:] else parts[0].limit(cap)
    number = int(await connection.scalar(select(func.count()).select_from(capped.subquery())) or 0)
    return Count(number, exact=number < cap and not behind)


async def _lowest_of_walk(connection: AsyncConnection, search: Search) -> uuid.UUID:
    """Below it are all but the newest flows."""
    query = _ordered(select(flows.c.flow_id).where(*_bounds(search.before, search.after)), 1).offset(_LONG_WALK)
    lowest: uuid.UUID | None = await connection.scalar(query)
    return lowest or _LOWEST
