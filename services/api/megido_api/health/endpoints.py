"""`/livez`, `/readyz`, `/metrics`."""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from megido_api.problems import ErrorAnswer, Problem, unavailable
from megido_api.state import State, StateDep
from megido_shared.errors import Unavailable

router = APIRouter(tags=["health"])

_BUS_TIMEOUT_S = 1.5
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/livez", summary="Whether the process runs", responses=_TEXT)
async def livez() -> Response:
    """Says nothing about what the process depends on."""
    return Response("ok\n", media_type="text/plain")


@router.get("/readyz", summary="Whether requests can be answered", responses=_TEXT | {503: {"model": ErrorAnswer}})
async def readyz(state: StateDep) -> Response:
    """503 names what is missing: Postgres, its migrations, or the bus."""
    missing = await not_ready(state)
    if missing:
        problem = unavailable("; ".join(missing), "not_ready")
        problem.details["missing"] = missing
        raise problem
    return Response("ready\n", media_type="text/plain")


async def not_ready(state: State) -> list[str]:
    """What is missing, one line each, within two seconds."""
    found = await asyncio.gather(_database(state), _bus(state))
    return [line for line in found if line]


async def _database(state: State) -> str:
    try:
        await state.database.check()
    except Problem as problem:
        return f"database: {problem.message}"
    return ""


async def _bus(state: State) -> str:
    try:
        async with asyncio.timeout(_BUS_TIMEOUT_S):
            await state.bus.ping()
    except (Unavailable, TimeoutError) as error:
        return f"bus: {str(error) or 'does not answer'}"
    return ""


@router.get("/metrics", summary="Metrics for Prometheus", responses=_TEXT)
async def metrics(state: StateDep) -> Response:
    return Response(generate_latest(state.registry), media_type=CONTENT_TYPE_LATEST)
