"""One child process: started in a session of its own, watched, asked whether it is ready, stopped."""

import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_KEEP_LOG = 8 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_STEADY_SECONDS = 60.0
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Spec:
    """`arguments` is asked anew at each start with the port of probes and metrics; `probe_port` chooses that."""

    name: str
    module: str
    arguments: Callable[[int], list[str]]
    probe_port: Callable[[], int]


class Child:
    def __init__(self, spec: Spec, log: Path, env: Mapping[str, str]) -> None:
        self.name = spec.name
        self.log = log
        self._spec = spec
        self._env = env
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._pause = _FIRST_PAUSE
        self._log_start = 0
        self.pidfd = -1
        self.port = 0
        self.restart_at = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        self._forget()
        if self.log.exists() and self.log.stat().st_size > _KEEP_LOG:
            self.log.replace(self.log.with_suffix(".log.1"))
        self.port = self._spec.probe_port()
        command = [sys.executable, "-P", "-m", "megido.launcher.child", str(os.getpid()), self._spec.module]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [*command, *self._spec.arguments(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._env),
                start_new_session=True,
            )
        self.pidfd = os.pidfd_open(self._process.pid)
        self._began = time.monotonic()
        self.restart_at = 0.0

    def ended(self) -> int:
        """Call once when it has ended by itself. Returns its exit code and sets when it may be started again."""
        assert self._process is not None
        code = self._process.wait()
        if time.monotonic() - self._began > _STEADY_SECONDS:
            self._pause = _FIRST_PAUSE
        self._end_group()
        self._forget()
        self.restart_at = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return code

    def missing(self) -> str:
        """Why it is not ready; "" when it is."""
        try:
            with _opener.open(f"http://127.0.0.1:{self.port}/readyz", timeout=1.0) as answer:
                answer.read()
            return ""
        except urllib.error.HTTPError as error:
            return " ".join(error.read(500).decode(errors="replace").split()) or f"status {error.code}"
        except (OSError, http.client.HTTPException):
            return "does not answer yet"

    def metric_sum(self, prefix: str) -> float | None:
        """The sum of its metrics whose names begin so; None without an answer or such a metric."""
        try:
            with _opener.open(f"http://127.0.0.1:{self.port}/metrics", timeout=1.0) as answer:
                lines = answer.read().decode().splitlines()
        except (OSError, http.client.HTTPException):
            return None
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(prefix)]
        return sum(values) if values else None

    def signal(self, number: int) -> None:
        if self.running and self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """At once, with whatever it started."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._end_group()
            self._forget()

    def last_lines(self, count: int = 12) -> list[str]:
        """What it printed last since its start."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                text = log.read()[-20_000:].decode(errors="replace")
        except FileNotFoundError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def _end_group(self) -> None:
        """Its session is its own, so what is left of the group is what it left behind."""
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _forget(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self._process = None
