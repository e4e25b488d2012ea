"""Named places where the fault tests stop this process. Inactive unless MEGIDO_FAILPOINT names one.

`MEGIDO_FAILPOINT=after_begin` kills at the first pass, `after_begin:7` at the seventh, `after_begin:7:stop` stops
(SIGSTOP) instead, as a suspended machine would.
"""

import os
import signal

POINTS = (
    "after_poll",
    "after_prepare",
    "after_begin",
    "after_function_call",
    "after_assembly",
    "after_commit",
    "after_bus_commit",
)
LOGS_POINTS = ("logs_after_write", "logs_after_commit")
RETENTION_POINTS = ("retention_after_day", "retention_after_rows", "retention_after_logs")

_name, _, _rest = os.environ.get("MEGIDO_FAILPOINT", "").partition(":")
_left = int(_rest.partition(":")[0] or 1)
_signal = signal.SIGSTOP if _rest.endswith("stop") else signal.SIGKILL


def reach(name: str) -> None:
    """Does nothing, except where a test asked for it."""
    global _left  # noqa: PLW0603 - one count a process
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), _signal)
