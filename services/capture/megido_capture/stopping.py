"""The seconds of a stop: one budget for all of its parts, so that their worst cases do not add up to more than a
supervisor waits before it kills."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PROMISE = 15.0
"""Seconds from SIGTERM to the end of the process, whatever goes wrong: what supervisors are told to wait."""

STOP = 14.0
"""Seconds of them for what a stop does."""

LAST_RESORT = 0.4
"""Seconds past its budget at which a process that is still there is ended; all that had to be written is in the
journal. The rest of the promise is for a machine that is busy."""

DRAIN = "drain"
DRAIN_SECONDS = 10.0
"""What open flows get to end at most. First in order, so it gives up what the others keep."""

RESERVED = {
    "websockets": 1.0,  # to answer 1001
    "cut": 1.0,  # for the hooks of connections that are cut
    "tasks": 0.5,  # what runs beside the hooks
    "forwarder": 2.5,  # to ship what was written last
}
"""Seconds that the later parts keep, in their order: each gets them, however long those before it took."""


WORKER_END = 1.0
"""Seconds between the end of a worker's budget and its parent's SIGKILL: within them a worker ends itself."""


class Budget:
    """Begins when it is made. A part is told by when it must be over: it gets what is left, less what those behind it
    keep. Not for several threads."""

    def __init__(
        self, seconds: float = STOP, *, without: tuple[str, ...] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`without` are parts that this stop does not have."""
        self.seconds = seconds
        self.spent: dict[str, float] = {}
        self._reserved = {name: kept for name, kept in RESERVED.items() if name not in without}
        self._clock = clock
        self._began = clock()

    @property
    def used(self) -> float:
        return self._clock() - self._began

    def deadline(self, name: str) -> float:
        """On the clock. A part past it has to give up at once."""
        names = list(self._reserved)
        behind = names[names.index(name) + 1 :] if name in self._reserved else names
        latest = self._began + self.seconds - sum(self._reserved[later] for later in behind)
        own = self._reserved.get(name, DRAIN_SECONDS if name == DRAIN else self.seconds)
        return min(self._clock() + own, latest)

    @contextmanager
    def part(self, name: str) -> Iterator[float]:
        """Yields the deadline, and counts what was spent."""
        began = self._clock()
        try:
            yield self.deadline(name)
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + self._clock() - began

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in self.spent.items())
        return f"{self.used:.1f} of {self.seconds:g} s ({parts})"


def of_group(*, forwarder: bool, clock: Callable[[], float] = time.monotonic) -> Budget:
    """Of a parent whose workers do what a stop does: its parts are them (`"workers"`), and its forwarder."""
    own = ("forwarder",) if forwarder else ()
    return Budget(STOP, without=tuple(name for name in RESERVED if name not in own), clock=clock)


def of_worker(*, forwarder: bool) -> float:
    """Seconds of a worker's stop: its parent kills none before its budget has ended."""
    return STOP - (RESERVED["forwarder"] if forwarder else 0.0) - WORKER_END
