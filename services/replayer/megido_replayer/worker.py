"""The service's loop: finds jobs, runs several at a time, keeps leases, settles what dead replayers left."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine

from megido_replayer import queries
from megido_replayer.addresses import Endpoint, Gate, parse_endpoints
from megido_replayer.attempt import Attempt, Tools, first_line, is_away
from megido_replayer.health import Health
from megido_replayer.jobs import JobRun
from megido_replayer.metrics import Metrics
from megido_replayer.queries import Job
from megido_replayer.recovery import recover
from megido_replayer.settings import Settings
from megido_shared.bus.local import Journal
from megido_shared.errors import Unavailable
from megido_shared.replay import ReplayOptions, from_json

_log = logging.getLogger(__name__)
_LAST_WORDS_S = 2.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the worker is made of; `__main__` composes it."""

    settings: Settings
    engine: AsyncEngine
    journal: Journal
    tools: Tools
    health: Health
    metrics: Metrics
    wake: asyncio.Event
    stop: asyncio.Event


class Worker:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._running: dict[uuid.UUID, asyncio.Task[int]] = {}

    async def run(self) -> None:
        """Until `stop` is set; then gives what is being sent `give_up_s` to end, and leaves every item settled
        as far as the database can be reached."""
        parts = self._parts
        await self._patiently(self._recover)
        leases = asyncio.create_task(self._keep_leases())
        try:
            while not parts.stop.is_set():
                parts.wake.clear()
                await self._patiently(self._round)
                await self._wait(parts.settings.poll_s)
        finally:
            await self._wind_up()
            leases.cancel()

    async def _recover(self) -> None:
        await recover(self._parts.engine, self._parts.journal, self._parts.tools.me)

    async def _round(self) -> None:
        """Looks at the whole table once and starts what is not running."""
        parts = self._parts
        async with parts.engine.begin() as connection:
            await queries.expire(connection)
        async with parts.engine.connect() as connection:
            jobs = await queries.open_jobs(connection, parts.settings.max_jobs * 4)
            listening = await queries.listening(connection) if jobs else []
        for job in jobs:
            if job.job_id not in self._running and len(self._running) < parts.settings.max_jobs:
                task = asyncio.create_task(self._run_job(job, listening), name=f"job {job.job_id}")
                self._running[job.job_id] = task
                parts.metrics.jobs.set(len(self._running))

    async def _run_job(self, job: Job, listening: list[str]) -> int:
        ended = 0
        try:
            try:
                options = from_json(job.options)
            except msgspec.ValidationError as error:
                async with self._parts.engine.begin() as connection:
                    await queries.fail_job(connection, job.job_id, f"the job's options cannot be read: {error}")
                return 0
            ended = await self._job_run(job, options, listening).run()
        except (DBAPIError, PoolTimeout, Unavailable, OSError) as error:
            _log.warning("job %s is interrupted: %s", job.job_id, first_line(error))
        except Exception:  # noqa: BLE001 - the other jobs go on, and this one is tried again
            _log.exception("job %s is interrupted", job.job_id)
        finally:
            del self._running[job.job_id]
            self._parts.metrics.jobs.set(len(self._running))
            if ended:
                self._parts.wake.set()  # there may be room for another job
        return ended

    def _job_run(self, job: Job, options: ReplayOptions, listening: list[str]) -> JobRun:
        parts = self._parts
        gate = Gate([*parts.settings.protected, *_endpoints([*listening, *options.protect])])
        attempt = Attempt(parts.tools, options, gate)
        return JobRun(
            tools=parts.tools, job=job, options=options, attempt=attempt, settings=parts.settings, stop=parts.stop
        )

    async def _keep_leases(self) -> None:
        parts = self._parts
        while True:
            await asyncio.sleep(parts.settings.lease_s / 3)
            try:
                async with parts.engine.begin() as connection:
                    await queries.renew(connection, parts.tools.me, list(self._running), parts.settings.lease_s)
            except (DBAPIError, PoolTimeout, OSError) as error:
                _log.warning("leases cannot be renewed now: %s", first_line(error))

    async def _patiently(self, step: Callable[[], Awaitable[None]]) -> None:
        """Does one step, again and again while the database is away, until it is done or `stop` is set."""
        parts = self._parts
        pause = 0.1
        while not parts.stop.is_set():
            try:
                await step()
            except (DBAPIError, PoolTimeout, OSError) as error:
                if isinstance(error, DBAPIError) and not is_away(error):
                    raise
                parts.health.bad("database", first_line(error))
                _log.warning("the database is away, trying again: %s", first_line(error))
                pause = min(pause * 2, parts.settings.poll_s)
                await self._wait(pause)
            else:
                parts.health.good("database")
                return

    async def _wait(self, seconds: float) -> None:
        """Until a command comes, `stop` is set, or the time has passed."""
        parts = self._parts
        waits = [asyncio.create_task(parts.wake.wait()), asyncio.create_task(parts.stop.wait())]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _wind_up(self) -> None:
        """What was begun and does not end in time is unknown, and said so now if the database hears it; if not,
        the next start says it."""
        running = list(self._running.values())
        if running:
            _, late = await asyncio.wait(running, timeout=self._parts.settings.give_up_s)
            for task in late:
                task.cancel()
            if late:
                _log.warning("gave up %d sends that did not end in time", len(late))
                await asyncio.wait(late, timeout=1.0)
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._recover()
        except (DBAPIError, PoolTimeout, OSError) as error:
            _log.warning("what is still claimed will be settled at the next start: %s", first_line(error))


def _endpoints(listening: list[str]) -> list[Endpoint]:
    """What nodes say where they listen; what cannot be read is left out."""
    found: list[Endpoint] = []
    for part in ",".join(listening).split(","):
        try:
            found.extend(parse_endpoints(part))
        except ValueError:
            continue
    return found
