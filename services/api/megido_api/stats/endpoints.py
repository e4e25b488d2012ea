"""`/proxy/api/stats/`."""

from datetime import timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.state import StateDep
from megido_api.stats import queries
from megido_api.stats.schemas import Stats
from megido_shared.clock import utc

router = APIRouter(prefix="/proxy/api", tags=["statistics"])

_RECENT = timedelta(hours=24)


@router.get("/stats/", summary="Statistics of everything stored so far", response_model=Stats)
async def get_stats(state: StateDep) -> Any:
    """Counted as flows are stored, so what retention removes stays counted."""
    since = utc(state.clock.time_us()) - _RECENT

    async def work(connection: AsyncConnection) -> tuple[dict[str, dict[str, int]], int]:
        return await queries.sums(connection), await queries.auth_failures_since(connection, since)

    counted, failures = await state.database.read(work)
    timed = _sum(counted, "responses_timed")
    return {
        "total_requests": _sum(counted, "requests"),
        "total_websocket_messages": _sum(counted, "websocket_messages"),
        "total_errors": _sum(counted, "errors"),
        "requests_by_method": _by_label(counted, "requests_by_method", "method"),
        "requests_by_protocol": _by_label(counted, "requests_by_protocol", "protocol"),
        "avg_response_time": round(_sum(counted, "response_time_us") / timed / 1000, 3) if timed else 0.0,
        "recent_auth_failures": failures,
    }


def _sum(counted: dict[str, dict[str, int]], name: str) -> int:
    return sum(counted.get(name, {}).values())


def _by_label(counted: dict[str, dict[str, int]], name: str, label: str) -> list[dict[str, Any]]:
    """Most frequent first. A label whose flows all changed to another one (0) is left out."""
    found = sorted(counted.get(name, {}).items(), key=lambda item: (-item[1], item[0]))
    return [{label: value, "count": number} for value, number in found if number]
