"""What every service's `main` does alike: logging to stderr, one clear line on an error, the right exit code."""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

from megido_shared.errors import MegidoError


def setup_logging(level: int = logging.INFO) -> None:
    """One line a record on stderr. Libraries that log every retry are held at WARNING."""
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("aiokafka", "httpx", "httpcore", "asyncio", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def guard(main: Callable[[], int | None]) -> int:
    """Runs `main` and returns its exit code; an error that a person can mend becomes one line on stderr."""
    try:
        return main() or 0
    except MegidoError as error:
        sys.stderr.write(f"megido: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


LAST_RESORT_S = 13.0
"""After a signal to stop. A service has 15 s."""


def stop_on_signals(leaving: str = "", after: float = LAST_RESORT_S) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. Call inside the running loop. `leaving` is the name of a service that
    leaves nothing behind: if it still runs `after` seconds past the signal, the process ends all the same. Work that
    waits for a stopped Postgres cannot be ended from inside the loop (cancelling psycopg waits for the server, #1371);
    what it held is rolled back there."""
    stop = asyncio.Event()

    def told() -> None:
        if leaving and not stop.is_set():
            _leave_at_last(leaving, after)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    return stop


def _leave_at_last(name: str, after: float) -> None:
    def leave() -> None:
        sys.stderr.write(f"{name}: something did not stop in time; leaving it\n")
        sys.stderr.flush()
        os._exit(0)

    timer = threading.Timer(after, leave)
    timer.daemon = True
    timer.start()
