"""Readiness and lag, looked at every second."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable
from contextlib import suppress

from megido_ingest.health import Health
from megido_ingest.metrics import Metrics
from megido_ingest.store import Store
from megido_ingest.worker import Worker
from megido_shared.bus.base import Bus
from megido_shared.errors import Unavailable

LOOK_S = 1.0
_PING_S = 5.0


async def watch(
    *, bus: Bus, store: Store, worker: Worker, metrics: Metrics, health: Health, stop: asyncio.Event
) -> None:
    """Keeps health and lag true until `stop`."""
    while not stop.is_set():
        health.database = await _asked(store.ping())
        health.bus = await _asked(bus.ping())
        await _look_at_lag(worker, metrics)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LOOK_S)


async def _asked(ping: Awaitable[None]) -> str:
    try:
        async with asyncio.timeout(_PING_S):
            await ping
    except Unavailable as error:
        return str(error)
    except TimeoutError:
        return f"no answer within {_PING_S:g} s"
    return ""


async def _look_at_lag(worker: Worker, metrics: Metrics) -> None:
    consumer = worker.consumer
    if consumer is None:
        return
    try:
        async with asyncio.timeout(_PING_S):
            lag = await consumer.lag()
    except (Unavailable, TimeoutError):
        return  # the last figures stand; readiness tells why
    topics: dict[str, int] = defaultdict(int)
    for stream, behind in lag.items():
        topics[stream.topic] += behind
    for topic, behind in topics.items():
        metrics.lag.labels(topic).set(behind)
    waiting = any(topics.values()) and worker.newest_ms > 0
    metrics.lag_seconds.set(max(0.0, time.time() - worker.newest_ms / 1000) if waiting else 0.0)
