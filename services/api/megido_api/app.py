"""The composition root: settings in, an ASGI application out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from megido_api import docs, problems
from megido_api.access import Guard
from megido_api.accounting.endpoints import router as accounting
from megido_api.auth.endpoints import router as auth
from megido_api.config.endpoints import router as config
from megido_api.database import Database
from megido_api.deadletters.endpoints import router as dead_letters
from megido_api.errors.endpoints import router as errors
from megido_api.events.endpoints import router as events
from megido_api.flows.endpoints import router as flows
from megido_api.health.endpoints import router as health
from megido_api.logs.endpoints import router as logs
from megido_api.metrics import RequestMetrics
from megido_api.nodes.endpoints import router as nodes
from megido_api.openapi import describe
from megido_api.publisher import SnapshotPublisher
from megido_api.replays.endpoints import router as replays
from megido_api.retention.endpoints import router as retention
from megido_api.rules.endpoints import router as rules
from megido_api.settings import Settings
from megido_api.state import State
from megido_api.stats.endpoints import router as stats
from megido_api.websockets.endpoints import router as websockets
from megido_shared.bus.base import Bus, Producer
from megido_shared.bus.open import open_bus
from megido_shared.clock import SystemClock
from megido_shared.db.connect import create_engine
from megido_shared.db.outbox import Relay

_CLOSE_TIMEOUT_S = 2.0
"""A piece at a time. What a stopped server holds is left behind (psycopg #1371)."""

_POOL: dict[str, Any] = {"pool_size": 10, "max_overflow": 10, "pool_timeout": 1.0}

_log = logging.getLogger(__name__)


def create_app(settings: Settings, *, bus: Bus | None = None) -> FastAPI:
    """Nothing is connected until the application's lifespan starts; Postgres and the bus may be away then, and
    at any time later. `bus` is another one than the settings name; it stays the caller's to close. Raises
    ConfigurationError."""
    settings.check()
    opened = bus or open_bus(settings.common)
    registry = CollectorRegistry()
    app = FastAPI(
        title="Megido",
        summary="The history of an intercepting proxy: search it, replay it, change what it injects.",
        lifespan=lambda app: _running(app, settings, registry, opened, close_bus=bus is None),
        generate_unique_id_function=_operation_id,
        docs_url=None,
        redoc_url=None,
    )
    app.state.stopping = asyncio.Event()
    problems.install(app)
    for router in (
        flows,
        replays,
        websockets,
        errors,
        auth,
        stats,
        events,
        rules,
        config,
        nodes,
        accounting,
        dead_letters,
        logs,
        retention,
        health,
    ):
        app.include_router(router)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(RequestMetrics, registry=registry)
    describe(app)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


async def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(docs.page(request.app.openapi()), headers={"Content-Security-Policy": docs.CSP})


@asynccontextmanager
async def _running(
    app: FastAPI, settings: Settings, registry: CollectorRegistry, bus: Bus, *, close_bus: bool
) -> AsyncIterator[None]:
    engine = create_engine(
        settings.common.database_url,
        application_name="megido-api",
        statement_timeout_ms=round(settings.statement_timeout_s * 1000),
        **_POOL,
    )
    database = Database(engine, connect_s=settings.connect_timeout_s, statement_s=settings.statement_timeout_s)

    def producer() -> Coroutine[Any, Any, Producer]:
        return bus.producer("api")

    relay = Relay(engine, producer)
    publisher = SnapshotPublisher(engine, bus)
    stopping: asyncio.Event = app.state.stopping
    app.state.megido = State(
        settings=settings,
        database=database,
        bus=bus,
        relay=relay,
        clock=SystemClock(),
        config_changed=publisher.wake,
        registry=registry,
        stopping=stopping,
    )
    stop = asyncio.Event()
    tasks = [_background(relay.run(stop), "outbox relay"), _background(publisher.run(), "configuration publisher")]
    try:
        yield
    finally:
        stop.set()
        stopping.set()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
        await database.close(_CLOSE_TIMEOUT_S)
        if close_bus:
            await asyncio.wait([asyncio.create_task(bus.close())], timeout=_CLOSE_TIMEOUT_S)


def _background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task whose end by a defect is seen in the log."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the %s ended", name, exc_info=error)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task
