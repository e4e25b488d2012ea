"""The forwarder child: ships the journal from a process of its own, so that the proxy's core pays nothing for it."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time

from megido_shared.datadir import DataDir

logger = logging.getLogger(__name__)

RESTART_AFTER = 5.0
"""Seconds before a forwarder that died is started again."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Forwarder:
    """Keeps one child running from `start` to `stop`; it idles by itself while a local ingest reads the journal."""

    def __init__(self, data_dir: DataDir, *, kafka: str, api_url: str) -> None:
        target = ["--kafka", kafka] if kafka else ["--api-url", api_url]
        self._command = [
            sys.executable,
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
                start_new_session=True,
                # Our death, kill -9 included, ends it; a new start brings its own.
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - runs one system call
            )
        except OSError as error:
            logger.warning("the forwarder cannot be started: %s", error)

    def stop(self, timeout: float = 5.0) -> None:
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        deadline = time.monotonic() + timeout
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
