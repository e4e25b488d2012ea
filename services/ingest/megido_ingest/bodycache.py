"""Which bodies need not be sent to the database again."""

import time
from collections.abc import Callable, Iterable

from megido_ingest.packing import EPOCH_2000_DAYS

type CacheVersion = tuple[int, int]
"""How often a cache was emptied, and the first day that it believes in."""

_EARLY_S = 600


class BodyCache:
    """(day, sha256) of bodies that are known to be stored, so that a repeated one is neither compressed nor sent.

    Only what a committed transaction stored is in it. It is emptied when a transaction fails (the database may be
    another one now), and what lies before yesterday is not believed from the moment that it does: retention may have
    taken it. `now` answers in seconds since 1970.
    """

    def __init__(self, limit: int = 50_000, now: Callable[[], float] = time.time) -> None:
        self._known: dict[tuple[int, bytes], None] = {}
        self._oldest = 0
        self._limit = limit
        self._cleared = 0
        self._now = now

    @property
    def version(self) -> CacheVersion:
        """A batch that was prepared under another one must be prepared again."""
        return self._cleared, self._yesterday()

    def __contains__(self, key: tuple[int, bytes]) -> bool:
        return key in self._known and key[0] >= self._yesterday()

    def _yesterday(self) -> int:
        """A little early: a batch that is on its way at midnight, and the database's clock, have their time."""
        return int((self._now() + _EARLY_S) // 86_400) - EPOCH_2000_DAYS - 1

    def add(self, keys: Iterable[tuple[int, bytes]], today: int) -> None:
        yesterday = self._yesterday()
        if yesterday > self._oldest:  # retention may take what lies before it
            self._known = {key: None for key in self._known if key[0] >= yesterday}
            self._oldest = yesterday
        for key in keys:
            if key[0] >= yesterday and abs(key[0] - today) <= 1:
                self._known[key] = None
        while len(self._known) > self._limit:
            del self._known[next(iter(self._known))]

    def clear(self) -> None:
        """Batches that were prepared with the old contents must be prepared again (`version`)."""
        self._known.clear()
        self._cleared += 1
