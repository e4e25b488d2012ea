"""What statistics and the indexes that searches want cost the insert path: ingest with and without, in turns."""

import asyncio
import random
from statistics import median

import psycopg

from benchmarks.ingest import a_flow, ingest_all
from benchmarks.report import say
from megido_shared import events
from megido_shared.db.connect import conninfo

_INDEXES = ("flows_source_app", "flows_error_type", "flows_is_replay", "flows_started_at")
_TABLES = ("flows", "websocket_messages", "errors", "auth_attempts")


def insert_ratio(url: str, rows: int = 10_000, rounds: int = 5) -> dict[str, float]:
    """rows/s with rollups and with those indexes ÷ rows/s without, in an empty database of its own."""
    rng = random.Random(3)
    values = [events.encode(a_flow(rng, n + 1)) for n in range(rows)]
    rates: dict[str, list[float]] = {"bare": [], "rollups": [], "rollups and indexes": []}
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        definitions = [
            row[0]
            for row in connection.execute("SELECT indexdef FROM pg_indexes WHERE indexname = ANY (%s)", [[*_INDEXES]])
        ]
        for number in range(rounds):
            for what, measured in rates.items():
                _arrange(connection, definitions, rollups=what != "bare", indexes="indexes" in what)
                measured.append(rows / asyncio.run(ingest_all(url, values, f"cost {number} {what}")))
            say(f"insert cost, round {number + 1}: " + ", ".join(f"{k} {v[-1]:,.0f}/s" for k, v in rates.items()))
    bare = median(rates["bare"])
    return {what: round(median(measured) / bare, 3) for what, measured in rates.items() if what != "bare"}


def _arrange(connection: psycopg.Connection, definitions: list[str], *, rollups: bool, indexes: bool) -> None:
    connection.execute("TRUNCATE flows, bodies, feed, counters, accounting, rollups")
    for table in _TABLES:
        connection.execute(f"ALTER TABLE {table} {'ENABLE' if rollups else 'DISABLE'} TRIGGER USER")
    for name in _INDEXES:
        connection.execute(f"DROP INDEX IF EXISTS {name}")
    for definition in definitions if indexes else ():
        connection.execute(definition.replace(" ON ONLY ", " ON "))
    connection.execute("CHECKPOINT")
