"""What every service's `main` does alike: logging to stderr, one clear line on an error, the right exit code."""

import asyncio
import logging
import signal
import sys
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


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. Call inside the running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
