"""What a node counts since its start, and the rule that a capture hook never raises into the proxy."""

import functools
import logging
import traceback
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any, Concatenate, Protocol

logger = logging.getLogger(__name__)


class Counters(Counter[str]):
    """Names as they appear in the node's heartbeat. `hook_errors:<hook>` for each hook that failed."""

    def hook_failed(self, hook: str, error: Exception) -> None:
        """Counts it, and logs the first of its kind. The text of the error may hold traffic, so it is cut."""
        name = f"hook_errors:{hook}"
        self["hook_errors"] += 1
        self[name] += 1
        if self[name] == 1:
            where = traceback.extract_tb(error.__traceback__)[-1]
            # A warning: an error logged while mitmproxy starts would end the process.
            logger.warning(
                "%s failed (%s at %s:%s: %.200s); the traffic goes on, later ones are only counted",
                hook,
                type(error).__name__,
                where.filename,
                where.lineno,
                error,
            )


class Counting(Protocol):
    counters: Counters


def contained[S: Counting, **P](hook: Callable[Concatenate[S, P], Any]) -> Callable[Concatenate[S, P], None]:
    """A hook that only observes: whatever it raises is counted and the traffic goes on.

    mitmproxy swallows it too, but prints it with the body bytes that it may hold and counts nothing.
    """
    name = hook.__name__

    @functools.wraps(hook)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - proxied traffic must not depend on what captures it
            self.counters.hook_failed(name, error)

    run.contains = hook  # type: ignore[attr-defined]
    return run


def uncontained(hook: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[Exception], None] | None]:
    """What a bound hook calls, and what takes its errors, for a caller that has a `try` of its own. None: whatever the
    hook raises is the caller's."""
    inner, owner = getattr(hook, "contains", None), getattr(hook, "__self__", None)
    if inner is None or owner is None:
        return hook, None
    return MethodType(inner, owner), functools.partial(owner.counters.hook_failed, inner.__name__)
