"""Time, passed in rather than read, so that tests own it."""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def time_us(self) -> int:
        """Wall clock in microseconds since the epoch. May jump."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back. Only differences mean something."""


class SystemClock:
    def time_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        return time.monotonic()


def utc(us: int) -> datetime:
    """Microseconds since the epoch as an aware UTC datetime."""
    seconds, micros = divmod(us, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)


def to_us(moment: datetime) -> int:
    """An aware datetime as microseconds since the epoch, exactly (no float in between)."""
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
