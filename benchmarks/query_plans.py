"""The plans of the main queries, as Postgres runs them: every statement that a search sends is explained."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from benchmarks.query_fill import BODY, URL
from megido_api.flows import queries
from megido_api.flows.queries import Filters
from megido_ingest.jsonlogs.entries import flow_entries
from megido_shared.db import search
from megido_shared.db.connect import create_engine
from megido_shared.db.read import complete
from megido_shared.db.tables import flow_text, flows

PATH = Path(__file__).parent.parent / "docs" / "query-plans.md"
_HEAD = """# Plans of the main queries

Written by `make bench-query ARGS="--plans"`: the statements that the list sends, over one million flows in eight daily
partitions, and what Postgres did for them (`EXPLAIN (ANALYZE, BUFFERS)`). A page is asked for in steps: the newest
thousand flows are looked through, and only what they do not answer is sought by the indexes, in windows of days that
grow (`megido_shared/db/search.py` says why). Parts of a plan that were never executed, and partitions that hold
nothing, are left out.
"""

type Statement = tuple[str, Any]


def write(url: str) -> None:
    """Makes `docs/query-plans.md`."""
    PATH.write_text(asyncio.run(_document(url)), encoding="utf-8")


async def _document(url: str) -> str:
    engine = create_engine(url, pool_size=1)
    try:
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            parts = [_HEAD]
            for title, ask in (await _main_queries(connection)).items():
                parts.append(await _section(engine, connection, title, ask))
            return "\n".join(parts)
    finally:
        await engine.dispose()


async def _main_queries(connection: AsyncConnection) -> dict[str, Callable[[], Awaitable[Any]]]:
    hosts = await connection.exec_driver_sql("SELECT host FROM flows GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 9")
    host = [row.host for row in hosts][-1]
    deep = await connection.exec_driver_sql("SELECT flow_id FROM flows ORDER BY 1 DESC OFFSET 500000 LIMIT 1")
    cursor = deep.scalar()

    def page(wanted: search.Search) -> Callable[[], Awaitable[Any]]:
        return lambda: search.newest(connection, queries.LISTED, wanted, 101)

    return {
        "The page at depth 500,000": lambda: queries.page(connection, Filters(), cursor=cursor, limit=100, offset=0),
        "Newest of a host and a status": page(search.Search(where=(flows.c.host == host, flows.c.status == 404))),
        "A substring of the URL, in one of a thousand": lambda: queries.page(
            connection, Filters(search=URL["rare"]), cursor=None, limit=100, offset=0
        ),
        "A substring of the response body, in one flow": page(
            search.Search(text=flow_text.c.response_body.ilike(f"%{BODY['once']}%"))
        ),
        "Count of a status, up to 10,001": lambda: search.count(
            connection, search.Search(where=(flows.c.status == 404,)), 10_001
        ),
    }


async def _section(
    engine: AsyncEngine, connection: AsyncConnection, title: str, ask: Callable[[], Awaitable[Any]]
) -> str:
    await ask()  # warm
    statements: list[Statement] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> None:
        statements.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        await ask()
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
    parts = [f"## {title}\n"]
    for statement, parameters in statements:
        rows = await connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", parameters)
        plan = _shortened([row[0] for row in rows])
        shown = _with_values(statement, parameters)
        parts.append(f"```sql\n{shown}\n```\n```\n" + "\n".join(plan) + "\n```\n")
    return "\n".join(parts)


def _with_values(statement: str, parameters: Any) -> str:
    """For reading: the listed columns as dots, values in their places."""
    values = {
        name: f"'{value}'" if isinstance(value, (str, UUID)) else value for name, value in dict(parameters).items()
    }
    columns, found, rest = re.sub(r"%\((\w+)\)s(::\w+)?", lambda m: str(values[m[1]]), statement).partition(" \nFROM")
    return (columns if len(columns) < 200 else columns[: columns.index(",")] + ", …") + found + rest


def _shortened(plan: list[str]) -> list[str]:
    """Without subtrees that were never executed or that scanned an empty partition."""
    kept: list[str] = []
    dropped_at: int | None = None
    for line in plan:
        depth = len(line) - len(line.lstrip())
        if dropped_at is not None and depth > dropped_at:
            continue
        dropped_at = None
        if "->" in line and ("(never executed)" in line or ("Seq Scan" in line and "cost=0.00..0.0" in line)):
            dropped_at = depth
            continue
        kept.append(line[:240])
    return kept


def json_bytes(url: str, sample: int = 500) -> int:
    """Bytes of a flow as JSON (its log entries, compact), the mean over a sample."""

    async def measured() -> int:
        engine = create_engine(url, pool_size=1)
        try:
            async with engine.connect() as connection:
                rows = (await connection.execute(select(flows).order_by(flows.c.flow_id).limit(sample))).all()
                found = [entry.fields for flow in await complete(connection, rows) for entry in flow_entries(flow, {})]
                return sum(len(json.dumps(fields, separators=(",", ":"))) for fields in found) // len(rows)
        finally:
            await engine.dispose()

    return asyncio.run(measured())
