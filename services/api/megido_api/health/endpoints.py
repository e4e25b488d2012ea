"""`/livez`, `/readyz`, `/metrics`."""

import asyncio

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from megido_api.problems import ErrorAnswer, Problem, unavailable
from megido_api.state import State, StateDep
from megido_shared.errors import Unavailable

router = APIRouter(tags=["health"])

_BUS_TIMEOUT_S = 1.5


@router.get("/livez", summary="Whether the process runs", response_class=PlainTextResponse)
async def livez() -> Response:
    """Says nothing about what the process depends on."""
    return PlainTextResponse("ok\n")


@router.get(
    "/readyz",
    summary="Whether requests can be answered",
    response_class=PlainTextResponse,
    responses={503: {"model": ErrorAnswer}},
)
async def readyz(state: StateDep) -> Response:
    """503 names what is missing: Postgres, its migrations, or the bus."""
    missing = await not_ready(state)
    if missing:
        problem = unavailable("; ".join(missing), "not_ready")
        problem.details["missing"] = missing
        raise problem
    return PlainTextResponse("ready\n")


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


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(state: StateDep) -> Response:
    return Response(generate_latest(state.registry), media_type=CONTENT_TYPE_LATEST)
