"""A clock that moves when a test says so."""


class FakeClock:
    def __init__(self, time_us: int = 1_771_000_000_000_000, monotonic: float = 1000.0) -> None:
        self._time_us = time_us
        self._monotonic = monotonic

    def time_us(self) -> int:
        return self._time_us

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Both clocks move on."""
        self._monotonic += seconds
        self._time_us += round(seconds * 1_000_000)

    def jump(self, seconds: float) -> None:
        """Only the wall clock moves, as when somebody sets it."""
        self._time_us += round(seconds * 1_000_000)
