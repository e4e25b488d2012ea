"""The real application over a real Postgres and a real local bus, and the real store behind them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI

from megido_api.app import create_app
from megido_api.settings import Settings
from megido_api.state import State
from megido_ingest.health import Health
from megido_ingest.metrics import Metrics
from megido_ingest.store import Store
from megido_ingest.worker import Worker
from megido_shared import events
from megido_shared.bus.base import Bus, Record
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import Topic
from megido_shared.db import outbox

BASE = "http://localhost:8000"


async def eventually[T](ask: Callable[[], Awaitable[T]], what: str, seconds: float = 20.0) -> T:
    """The first truthy answer; fails with the last one after a while."""
    deadline = time.monotonic() + seconds
    while not (answer := await ask()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; last: {answer!r}"
        await asyncio.sleep(0.02)
    return answer


@dataclass
class Api:
    app: FastAPI
    client: httpx.AsyncClient
    bus: Bus

    @property
    def state(self) -> State:
        found: State = self.app.state.megido
        return found

    async def get(self, path: str, status: int = 200, **params: Any) -> Any:
        answer = await self.client.get(path, params=params or None)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def send(self, method: str, path: str, document: Any = None, status: int = 200) -> Any:
        # json.dumps escapes what is not ASCII, lone surrogates too; httpx's own encoding refuses those.
        content = None if document is None else json.dumps(document)
        headers = {} if content is None else {"Content-Type": "application/json"}
        answer = await self.client.request(method, path, content=content, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def post(self, path: str, document: Any, status: int = 201) -> Any:
        return await self.send("POST", path, document, status)

    async def stored(self, search: str, count: int = 1) -> list[dict[str, Any]]:
        """Listed flows whose URL has `search`, once there are `count` that have ended."""

        async def ended() -> list[dict[str, Any]]:
            listed = await self.get("/proxy/api/requests/", search=search, limit=1000)
            found = [one for one in listed["requests"] if one["state"] != "started"]
            return found if len(found) == count else []

        return await eventually(ended, f"{count} stored flows with {search}")

    async def publish(self, *published: events.AnyEvent) -> None:
        """As a capture node would."""
        producer = await self.bus.producer("test")
        await producer.append([outbox.outgoing(event) for event in published])
        await producer.close()


@asynccontextmanager
async def running(settings: Settings, bus: Bus | None = None) -> AsyncIterator[Api]:
    """The application with its background work, and a client of it."""
    bus = bus or LocalBus(settings.common.data_dir)
    app = create_app(settings, bus=bus)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        yield Api(app, client, bus)


class Ingest:
    """The worker of the ingest service."""

    def __init__(self, bus: Bus, database: str) -> None:
        self._bus = bus
        self._database = database
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._stop.clear()
        self._store = Store(self._database)
        self.metrics = Metrics("bytes")
        worker = Worker(self._bus, self._store, self.metrics, Health())
        self._task = asyncio.create_task(worker.run(self._stop))

    async def stop(self) -> None:
        if self._task is None:
            return
        self._stop.set()
        task, self._task = self._task, None
        await asyncio.wait_for(task, 20)
        await self._store.close()

    @property
    def letters(self) -> float:
        """Dead letters so far."""
        return self.metrics.registry.get_sample_value("megido_ingest_dead_letters_total") or 0.0


async def on_topic(bus: Bus, topic: Topic, count: int, group: str = "watcher") -> list[Record]:
    """The first `count` records of a topic."""
    consumer = await bus.consumer(group, [topic])
    found: list[Record] = []

    async def more() -> bool:
        found.extend((await consumer.poll(timeout=0.1)).records)
        return len(found) >= count

    try:
        await eventually(more, f"{count} records on {topic.name}")
    finally:
        await consumer.close()
    return found
