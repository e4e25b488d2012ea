"""One worker: `python -m megido_capture.workers.worker SHARE …`, the rest as of `megido capture`.

Its standard input is the parent: for each line it answers with its metrics, and at the end there is no parent any more,
so it stops as on SIGTERM. On its standard output it reports, a JSON document a line: that it serves, or why it cannot,
and its metrics. It listens on no port but the proxy's.
"""

import os
import signal
import sys
import threading

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from megido_shared.errors import MegidoError

GRACE = 1.0
"""Seconds past the budget of its stop in which a worker whose parent is gone must have ended by itself."""


class Share(msgspec.Struct, frozen=True):
    """What the parent decided for all of its workers; `metrics_port` is its own, for all of them, `stop_seconds` the
    budget of each one's stop."""

    workers: int
    modes: list[str]
    listen_port: int
    metrics_port: int
    stop_seconds: float


class Serving(msgspec.Struct, frozen=True, tag=True):
    """It listens."""

    node: str
    certificate: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It ends, because of something that a person can mend."""

    message: str
    exit_code: int


class Scraped(msgspec.Struct, frozen=True, tag=True):
    """Its metrics, in the text format of Prometheus."""

    metrics: str


type Report = Serving | Refused | Scraped


class Parent:
    """The worker's end of the two pipes. Safe to use from several threads."""

    def __init__(self, share: Share) -> None:
        """Takes standard output for the reports; what else is printed goes to standard error."""
        self.share = share
        self.registry = CollectorRegistry()
        self._channel = os.fdopen(os.dup(1), "wb")
        self._lock = threading.Lock()
        os.dup2(2, 1)
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def report(self, what: Report) -> None:
        try:
            with self._lock:
                self._channel.write(msgspec.json.encode(what) + b"\n")
                self._channel.flush()
        except BrokenPipeError:
            return  # it is gone, and we are being told so

    def _listen(self) -> None:
        for _ in sys.stdin.buffer:
            self.report(Scraped(generate_latest(self.registry).decode()))
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(self.share.stop_seconds + GRACE)
        os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> int:
    parent = Parent(msgspec.json.decode(argv[0], type=Share))
    from megido_capture.__main__ import serve_share  # noqa: PLC0415 - slow to load, and the parent may end meanwhile

    try:
        serve_share(parent, argv[1:], os.environ)
    except MegidoError as error:
        parent.report(Refused(str(error), error.exit_code))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
