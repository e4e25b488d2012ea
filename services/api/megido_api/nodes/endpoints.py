"""`/proxy/api/nodes/`."""

from datetime import datetime, timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy import Row

from megido_api.fields import Filter, Flag
from megido_api.nodes import queries
from megido_api.nodes.schemas import Nodes
from megido_api.parameters import ONLY_KNOWN
from megido_api.state import StateDep
from megido_api.views import iso
from megido_shared.clock import utc

router = APIRouter(prefix="/proxy/api/nodes", tags=["nodes"])

_SILENT = timedelta(seconds=20)
"""Heartbeats come every five."""


@router.get("/", summary="The nodes that were heard of", response_model=Nodes, dependencies=ONLY_KNOWN)
async def list_nodes(state: StateDep, service: Filter = None, alive: Flag = None) -> Any:
    """Which configuration each applies, what its start decided over it, and what it counted."""
    now = utc(state.clock.time_us())
    rows = await state.database.read(lambda connection: queries.listed(connection, service))
    found = [_shown(row, now) for row in rows]
    if alive is not None:
        found = [node for node in found if node["alive"] == alive]
    return {"nodes": found, "total": len(found)}


def _shown(row: Row[Any], now: datetime) -> dict[str, Any]:
    return {
        "node": row.node,
        "epoch": str(row.epoch),
        "service": row.service,
        "state": row.state,
        "alive": row.state != "stopping" and now - row.seen_at < _SILENT,
        "version": row.version,
        "listen": row.listen,
        "source_app": row.source_app,
        "config_version": row.config_version,
        "config_expected": row.config_expected,
        "config_stale": row.config_stale,
        "config_error": row.config_error,
        "pinned": row.pinned,
        "counters": row.counters,
        "captured": row.captured,
        "seen_at": iso(row.seen_at),
        "started_at": None if row.started_at is None else iso(row.started_at),
    }
