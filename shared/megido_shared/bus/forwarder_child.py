"""The forwarder as a child of a service that has a journal: shipping costs the service's own core nothing."""

import asyncio
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import IO

import megido_shared
from megido_shared.datadir import DataDir

logger = logging.getLogger(__name__)

RESTART_AFTER = 5.0
"""Seconds before a forwarder that died is started again."""

STOP_SECONDS = 3.5
"""With the ten seconds that open flows get, a service is gone within its fifteen."""

_LINE = re.compile(r"[-\d]+ [:,\d]+ ([A-Z]+) ([\w.]+): (.*)")
"""What `setup_logging` makes of a record."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ForwarderChild:
    """Keeps one child running between the first `tick` and `stop`, which the caller's main thread calls. Over HTTP
    it idles by itself while a local ingest reads the journal; several on one data directory share its files, so
    it does no harm beside another service's. What it says goes through our log: a terminal may be mitmproxy's
    screen."""

    def __init__(self, data_dir: DataDir, *, kafka: str, api_url: str = "") -> None:
        target = ["--kafka", kafka] if kafka else ["--api-url", api_url]
        self._command = [
            sys.executable,
            "-P",  # nothing of the folder that somebody happens to be in
            "-m",
            "megido_shared.bus.forwarder",
            "--data-dir",
            str(data_dir.root),
            *target,
        ]
        self._child: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0

    def tick(self, now: float) -> None:
        """Starts it, and starts it again when it has died."""
        if self._child is not None and self._child.poll() is None:
            return
        if now < self._next_start:
            return
        if self._child is not None:
            logger.warning("the forwarder ended with code %s and is started again", self._child.returncode)
        self._next_start = now + RESTART_AFTER
        try:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=_environment(),
                # Our death, kill -9 included, ends it; a new start brings its own.
                preexec_fn=partial(_die_with, os.getpid()),  # noqa: PLW1509 - runs two system calls
            )
        except OSError as error:
            logger.warning("the forwarder cannot be started: %s", error)
            return
        threading.Thread(target=_tell, args=(self._child.stderr,), name="forwarder log", daemon=True).start()

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Asks it to end, and ends it: what was not acknowledged yet is shipped again."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


async def keep_running(child: ForwarderChild) -> None:
    """Until cancelled; then the child is stopped."""
    try:
        while True:
            child.tick(time.monotonic())
            await asyncio.sleep(1.0)
    finally:
        await asyncio.to_thread(child.stop)


def _tell(lines: IO[bytes]) -> None:
    """Logs what the child says until its end. Nothing above a warning: mitmproxy ends when an error is logged while
    it starts."""
    with lines:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            found = _LINE.fullmatch(text)
            level, name, text = found.groups() if found else ("WARNING", "megido.forwarder", text)
            logging.getLogger(name).log(logging.INFO if level == "INFO" else logging.WARNING, "%s", text)


def _environment() -> dict[str, str]:
    """In a checkout that is not installed our packages are found by a path that the child does not inherit."""
    packages = str(Path(megido_shared.__file__).parents[1])
    given = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{given}{os.pathsep}{packages}" if given else packages}


def _die_with(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
