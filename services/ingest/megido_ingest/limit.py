"""How many records may become dead letters: a bad deploy must not turn all of the traffic into them."""

from collections import deque
from collections.abc import Callable

from megido_shared.errors import MegidoError

DEFAULT = 1_000
"""Dead letters of a worker within `WINDOW_S`."""
WINDOW_S = 60.0
SHARE = 0.2
"""Of the records within the window, once there are a tenth of the limit: a bad deploy where little comes."""


class TooManyDeadLetters(MegidoError):
    """A batch that must not be stored. The bus still has its records, and the database says where reading goes on."""


class DeadLetterLimit:
    """Counts what one worker stored within the last minute. `most` 0 is no limit; `clock` is monotonic seconds.

    Single bad records, and a client that makes some, stay below it; what every record of a new version is, or what a
    new version cannot read, does not.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._window: deque[tuple[float, int, int]] = deque()
        self._records = 0
        self._letters = 0

    def exceeded_by(self, records: int, letters: int) -> str:
        """Why a batch with so many new dead letters must not be stored; empty when it may be."""
        if not self._most or not letters:
            return ""
        self._forget()
        all_records, all_letters = self._records + records, self._letters + letters
        share = all_letters > SHARE * all_records and all_letters >= max(1, self._most // 10)
        if all_letters <= self._most and not share:
            return ""
        return f"{all_letters} of {all_records} records within {WINDOW_S:g} s would be dead letters"

    def count(self, records: int, letters: int) -> None:
        """A batch was stored."""
        if self._most:
            self._forget()
            self._window.append((self._clock(), records, letters))
            self._records += records
            self._letters += letters

    def _forget(self) -> None:
        horizon = self._clock() - WINDOW_S
        while self._window and self._window[0][0] <= horizon:
            _, records, letters = self._window.popleft()
            self._records -= records
            self._letters -= letters
