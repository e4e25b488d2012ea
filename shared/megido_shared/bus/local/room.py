"""Waiting for room in a journal, on an event loop: what wants it waits, everything else goes on."""

import asyncio
from contextlib import suppress

from megido_shared.bus.local.journal import Journal

LOOK_SECONDS = 0.05


class Room:
    """One a journal. All that wait are woken together; one task looks for all of them, and only while somebody
    waits."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: set[asyncio.Future[bool]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._over = False

    @property
    def is_open(self) -> bool:
        """Whether `wait` would return True at once."""
        return not (self._over or self._journal.is_nearly_full)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def wait(self, seconds: float) -> bool:
        """Returns at once while the journal is not nearly full (see `Journal.is_nearly_full`), else as soon as it is
        not any more. False when that took more than `seconds`, or `give_up` was called."""
        if self.is_open or self._over:
            return not self._over
        freed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.add(freed)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    return await freed
            return False
        finally:
            self._waiting.discard(freed)

    def give_up(self) -> None:
        """Lets everybody go, now and later: the process is about to end."""
        self._over = True
        self._tell(freed=False)

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._journal.is_nearly_full:
                self._tell(freed=True)

    def _tell(self, *, freed: bool) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(freed)
