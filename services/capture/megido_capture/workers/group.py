"""The parent of the workers: starts them, starts a dead one again, ends them all."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import msgspec

from megido_capture.stopping import of_group
from megido_capture.workers.worker import Refused, Report, Scraped, Serving, Share
from megido_shared.bus.forwarder_child import ForwarderChild
from megido_shared.errors import ConfigurationError, MegidoError

logger = logging.getLogger(__name__)

STEADY = 5.0
"""A worker that served so long starts again at once, as often as it takes."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
GIVE_UP = 4
"""Starts in a row that failed, of every worker, after which there is no use in trying."""

FORWARDER_TICK = 1.0
LONGEST_REPORT = 1 << 24
"""Bytes of a line with a worker's metrics."""


class Worker:
    """One of the processes, in all its lives."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.serving: Serving | None = None
        self.served_since = 0.0
        self.refused: Refused | None = None
        self.failures = 0
        self.restarts = 0
        self._scrapes: list[Future[str]] = []

    def ask(self, answer: Future[str]) -> None:
        """For its metrics. Without an answer when it ends first."""
        if self.serving is None or self.process is None or self.process.stdin is None:
            answer.set_result("")
            return
        self._scrapes.append(answer)
        self.process.stdin.write(b"\n")

    def answer(self, metrics: str) -> None:
        """To all that wait: what one scrape finds is new enough for the others."""
        waiting, self._scrapes = self._scrapes, []
        for answer in waiting:
            answer.set_result(metrics)

    def pause(self) -> float:
        """Call when it has ended: seconds before its next start."""
        steady = self.served_since and time.monotonic() - self.served_since >= STEADY
        self.failures = 0 if steady else self.failures + 1
        self.served_since = 0.0
        self.restarts += 1
        return min(FIRST_PAUSE * 2 ** (self.failures - 1), LONGEST_PAUSE) if self.failures else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`arguments` are those of the parent, which the workers read again. `forwarder` is None where something else
    ships the journals."""

    share: Share
    arguments: Sequence[str]
    env: Mapping[str, str]
    forwarder: ForwarderChild | None


class Group:
    def __init__(self, workers: int) -> None:
        """Made in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._all_serve = asyncio.Event()
        self._spawning = asyncio.Lock()
        self.workers = [Worker(number) for number in range(workers)]

    def serving(self) -> list[Serving]:
        found = [worker.serving for worker in self.workers if worker.serving is not None]
        return sorted(found, key=lambda serving: serving.node)

    def missing(self) -> list[str]:
        """For `/readyz`, in another thread."""
        serving = len(self.serving())
        return [] if serving == len(self.workers) else [f"{serving} of {len(self.workers)} workers serve"]

    def scrape(self, seconds: float) -> dict[str, str]:
        """The metrics of those that serve and answer in time, by node. In another thread than the loop's."""
        asked: dict[str, Future[str]] = {}
        for worker in self.workers:
            if (serving := worker.serving) is not None:
                answer: Future[str] = Future()
                asked[serving.node] = answer
                self._loop.call_soon_threadsafe(worker.ask, answer)
        wait(asked.values(), seconds)
        return {node: answer.result() for node, answer in sorted(asked.items()) if answer.done()}

    async def serve(self, plan: Plan, stop: asyncio.Event, ready: Callable[[list[Serving]], None]) -> None:
        """Until `stop`; calls `ready` once, when all serve. Raises MegidoError when none can; no process is left
        behind in any case."""
        keeping = [asyncio.create_task(self._keep(worker, plan)) for worker in self.workers]
        beside = [asyncio.create_task(self._announce(ready))]
        if plan.forwarder is not None:
            beside.append(asyncio.create_task(self._forward(plan.forwarder)))
        stopped = asyncio.create_task(stop.wait())
        first: list[asyncio.Future[Any]] = [stopped, self._failed, *keeping]
        try:
            done, _ = await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for task in [stopped, *beside]:
                task.cancel()
            await self._end(keeping, plan.forwarder)

    async def _keep(self, worker: Worker, plan: Plan) -> None:
        """One worker, life after life."""
        while not self._stop.is_set():
            worker.refused = None
            code = await self._life(worker, plan)
            pause = worker.pause()
            if self._stop.is_set() or self._failed.done():
                return
            if (error := self._hopeless(worker, code)) is not None:
                self._failed.set_exception(error)
                return
            logger.warning("worker %d ended (%s) and is started again", worker.number, _how(worker, code))
            await _wait(self._stop, pause)

    async def _life(self, worker: Worker, plan: Plan) -> int:
        """Returns its exit code."""
        share = msgspec.json.encode(plan.share).decode()
        worker.process = process = await self._spawn(share, plan)
        assert process.stdout is not None
        if self._stop.is_set():
            process.terminate()
        try:
            async for line in process.stdout:
                self._told(worker, line)
            return await process.wait()
        except (msgspec.DecodeError, ValueError) as error:
            # ValueError: a line longer than LONGEST_REPORT. One worker that babbles must not end the others.
            logger.error("worker %d says what cannot be read and is ended: %s", worker.number, error)
            process.kill()
            return await process.wait()
        finally:
            worker.serving = None
            worker.answer("")

    async def _spawn(self, share: str, plan: Plan) -> asyncio.subprocess.Process:
        # The mask is inherited: Ctrl-C reaches every process of a terminal, and the parent passes it on. (Code run
        # between fork and exec could hang: this process has threads.)
        async with self._spawning:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "megido_capture.workers.worker", share, *plan.arguments),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env=dict(plan.env),
                    limit=LONGEST_REPORT,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _told(self, worker: Worker, line: bytes) -> None:
        match msgspec.json.decode(line, type=Report.__value__):
            case Serving() as serving:
                worker.serving, worker.served_since = serving, time.monotonic()
                logger.info("worker %d serves as %s", worker.number, serving.node)
                if not self.missing():
                    self._all_serve.set()
            case Refused() as refused:
                worker.refused = refused
            case Scraped(metrics):
                worker.answer(metrics)

    def _hopeless(self, worker: Worker, code: int) -> MegidoError | None:
        """Why nothing is left to try. What a worker refuses before the group ever served, a start again would not
        mend."""
        if worker.refused is not None and not self._all_serve.is_set():
            kind = ConfigurationError if worker.refused.exit_code == ConfigurationError.exit_code else MegidoError
            return kind(worker.refused.message)
        if self.serving() or any(other.failures < GIVE_UP for other in self.workers):
            return None
        return MegidoError(f"no worker can be started; the last one ended with {_how(worker, code)}")

    async def _announce(self, ready: Callable[[list[Serving]], None]) -> None:
        await self._all_serve.wait()
        ready(self.serving())

    async def _forward(self, forwarder: ForwarderChild) -> None:
        await self._all_serve.wait()
        while True:
            forwarder.tick(time.monotonic())
            await asyncio.sleep(FORWARDER_TICK)

    async def _end(self, keeping: list[asyncio.Task[None]], forwarder: ForwarderChild | None) -> None:
        """SIGTERM to all, SIGKILL to those that do not end within their budget; the forwarder last, for what they wrote
        last."""
        self._stop.set()
        budget = of_group(forwarder=forwarder is not None)
        self._signal(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):  # a second one: a worker that gets it waits no longer
            asyncio.get_running_loop().add_signal_handler(number, self._signal, signal.SIGTERM)
        with budget.part("workers") as deadline:
            _, late = await asyncio.wait(keeping, timeout=max(0.0, deadline - time.monotonic()))
            if late:
                logger.warning("%d of %d workers did not end in time and are killed", len(late), len(keeping))
                self._signal(signal.SIGKILL)
                await asyncio.wait(late)
        if forwarder is not None:
            with budget.part("forwarder") as deadline:
                await asyncio.to_thread(forwarder.stop, max(0.0, deadline - time.monotonic()))
        logger.info("stopped in %s", budget)

    def _signal(self, number: int) -> None:
        for worker in self.workers:
            if worker.process is not None and worker.process.returncode is None:
                worker.process.send_signal(number)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _how(worker: Worker, code: int) -> str:
    if worker.refused is not None:
        return worker.refused.message
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
