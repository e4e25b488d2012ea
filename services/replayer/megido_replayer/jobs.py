"""One job: claims its items in order, runs them, honours delay, cancel and pause between them."""

import asyncio
import time
from collections import deque

from megido_replayer import queries
from megido_replayer.attempt import Attempt, Tools
from megido_replayer.queries import Item, Job
from megido_replayer.settings import Settings
from megido_shared.replay import ReplayOptions

BATCH = 50


class JobRun:
    """The part of a job that this process runs, until nothing of it can be claimed or `stop` is set."""

    def __init__(
        self,
        *,
        tools: Tools,
        job: Job,
        options: ReplayOptions,
        attempt: Attempt,
        settings: Settings,
        stop: asyncio.Event,
    ) -> None:
        self._tools = tools
        self._job = job
        self._options = options
        self._attempt = attempt
        self._stop = stop
        self._workers = 1 if options.delay_s > 0 else max(settings.concurrency, 1)
        self._batch = 1 if options.delay_s > 0 else BATCH
        self._claimed: deque[Item] = deque()
        self._claiming = asyncio.Lock()
        self._open = True
        self._last_end: float | None = None

    async def run(self) -> int:
        """How many items ended here. Raises what Attempt.run raises; nothing stays claimed then if it can be helped."""
        async with self._tools.engine.begin() as connection:
            await queries.start_job(connection, self._job.job_id, self._tools.me)
        try:
            ended = await asyncio.gather(*(self._work() for _ in range(self._workers)), return_exceptions=True)
        finally:
            if self._claimed:
                await self._give_back()
        for result in ended:
            if isinstance(result, BaseException):
                raise result
        async with self._tools.engine.begin() as connection:
            await queries.finish_job(connection, self._job.job_id)
        return sum(result for result in ended if isinstance(result, int))

    async def _work(self) -> int:
        ended = 0
        while (item := await self._next()) is not None:
            if not await self._pause():
                self._claimed.appendleft(item)
                break
            if await self._attempt.run(item) == "lost":
                self._open = False
                self._claimed.appendleft(item)
                break
            self._last_end = time.monotonic()
            ended += 1
        return ended

    async def _next(self) -> Item | None:
        async with self._claiming:
            if not self._claimed and self._open and not self._stop.is_set():
                async with self._tools.engine.begin() as connection:
                    claimed = await queries.claim(
                        connection,
                        self._job.job_id,
                        self._tools.me,
                        most=self._batch,
                        lease_s=self._tools.lease_s,
                        ordered=self._workers == 1,
                    )
                self._claimed.extend(claimed)
                self._open = bool(claimed)
            if not self._open or self._stop.is_set() or not self._claimed:
                return None
            return self._claimed.popleft()

    async def _pause(self) -> bool:
        """Waits until the delay after the item before has passed. False when the job or the process ends first."""
        if self._options.delay_s <= 0 or self._last_end is None:
            return True
        while (left := self._last_end + self._options.delay_s - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._stop.wait(), timeout=min(left, 0.5))
            except TimeoutError:
                async with self._tools.engine.connect() as connection:
                    if await queries.job_state(connection, self._job.job_id) != "running":
                        return False
            else:
                return False
        return True

    async def _give_back(self) -> None:
        items, self._claimed = list(self._claimed), deque()
        async with self._tools.engine.begin() as connection:
            await queries.release(connection, items, self._tools.me)
