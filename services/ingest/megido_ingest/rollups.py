"""Upkeep of the rollups, which triggers fill: minutes are kept for days, hours for months, days for ever."""

from typing import Any

import psycopg

from megido_shared.db.rollups import KEPT

_PRUNE = "DELETE FROM rollups WHERE minutes = %s AND bucket < now() - %s::interval"


async def prune(connection: psycopg.AsyncConnection[Any]) -> int:
    """Removes rows that are older than their width is kept; answers how many. Coarser rows hold the same counts."""
    removed = 0
    for width, kept in KEPT.items():
        removed += (await connection.execute(_PRUNE, [width, kept])).rowcount
    return removed
