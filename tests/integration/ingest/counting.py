"""What the rollups must hold, counted naively from the rows."""

import math
from collections import Counter
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row

from megido_shared.db import rollups
from megido_shared.db.connect import conninfo

type Counted = dict[tuple[int, str, datetime, str], int]


def expected(url: str) -> Counted:
    """(width, name, bucket, label): value, for what is in the database now."""
    found: Counter[tuple[int, str, datetime, str]] = Counter()

    def add(at: datetime, name: str, label: Any = "", value: int = 1) -> None:
        for width in (1, 60, 1440):
            found[width, name, rollups.floor(at, width), str(label)] += value

    with psycopg.connect(conninfo(url), row_factory=dict_row) as connection:
        connection.execute("SET timezone = UTC")
        for row in connection.execute("SELECT * FROM flows").fetchall():
            _add_flow(row, add)
        for row in connection.execute("SELECT occurred_at FROM websocket_messages").fetchall():
            add(row["occurred_at"], "messages")
        for row in connection.execute("SELECT occurred_at FROM auth_attempts WHERE NOT success").fetchall():
            add(row["occurred_at"], "auth_failures")
        for row in connection.execute("SELECT * FROM errors WHERE flow_id IS DISTINCT FROM error_id").fetchall():
            add(row["occurred_at"], "error", row["error_type"])
    return {key: value for key, value in found.items() if value}


def _add_flow(row: dict[str, Any], add: Any) -> None:
    at = row["started_at"]
    add(at, "requests")
    add(at, "request_bytes", value=row["request_size"])
    add(at, "response_bytes", value=row["response_size"] or 0)
    for name in ("method", "protocol", "host"):
        add(at, name, row[name])
    if row["status"] is not None:
        add(at, "status", row["status"])
    if row["rank"] == 3:
        add(at, "error", row["error_type"])
    if row["rank"] == 4 and row["status"] is not None:
        add(at, "responses")
    if row["rank"] == 4 and row["response_time_us"] is not None:
        add(at, "responses_timed")
        add(at, "response_time_us", value=row["response_time_us"])
        add(at, "latency", math.floor(4 * math.log2(max(1, row["response_time_us"]))))


def stored(url: str) -> Counted:
    """The same from the rollups."""
    query = "SELECT minutes, name, bucket, label, sum(value)::bigint FROM rollups GROUP BY 1, 2, 3, 4"
    with psycopg.connect(conninfo(url)) as connection:
        connection.execute("SET timezone = UTC")
        rows = connection.execute(query).fetchall()
    return {(width, name, bucket, label): value for width, name, bucket, label, value in rows if value}
