"""One worker: `python -m megido_capture.workers.worker SHARE …`, the rest as of `megido capture`.

Its standard output is how it reports to its parent, a JSON document a line: where it serves, or why it cannot. Its
standard input is the parent: at the end of it there is none any more, and the worker stops as on SIGTERM.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

import msgspec

from megido_shared.errors import MegidoError

GRACE = 14.0
"""Seconds in which a worker whose parent is gone must have ended by itself."""


class Share(msgspec.Struct, frozen=True):
    """What the parent decided for all of its workers."""

    workers: int
    modes: list[str]
    listen_port: int


class Serving(msgspec.Struct, frozen=True, tag=True):
    """It listens. `metrics_port` is on loopback."""

    node: str
    metrics_port: int
    certificate: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It ends, because of something that a person can mend."""

    message: str
    exit_code: int


type Report = Serving | Refused


def main(argv: list[str]) -> int:
    share = msgspec.json.decode(argv[0], type=Share)
    report = _reports()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    from megido_capture.__main__ import serve_share  # noqa: PLC0415 - slow to load, and the parent may end meanwhile

    try:
        serve_share(share, argv[1:], os.environ, report)
    except MegidoError as error:
        report(Refused(str(error), error.exit_code))
        return error.exit_code
    return 0


def _reports() -> Callable[[Report], None]:
    """Takes standard output for the reports; what else is printed goes to standard error."""
    channel = os.dup(1)
    os.dup2(2, 1)

    def report(what: Report) -> None:
        os.write(channel, msgspec.json.encode(what) + b"\n")

    return report


def _end_with_parent() -> None:
    while os.read(0, 64):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
