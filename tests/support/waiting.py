"""Waiting for a condition with a deadline, never for a time."""

import time
from collections.abc import Callable


def until[T](condition: Callable[[], T], what: str, *, seconds: float = 20.0, every: float = 0.05) -> T:
    """The first truthy answer of `condition`. Fails with `what` and the last answer after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}; last: {answer!r}")
        time.sleep(every)
