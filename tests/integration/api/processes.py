"""Services as processes of their own, as they run outside tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.waiting import until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    dropped = ("MEGIDO_", "PROXY_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | more


class Service:
    """One process of ours; what it prints is in `output()`."""

    def __init__(self, module: str, *arguments: str, log: Path, env: dict[str, str] | None = None) -> None:
        self._log = log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=environment(**(env or {})),
        )

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self, port: int, seconds: float = 30.0) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.output()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False, timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(ready, f"readiness: {self.output()}", seconds=seconds)

    def stop(self, seconds: float = 15.0) -> tuple[int, float]:
        """SIGTERM; the exit code, and how long it took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(seconds)
        return code, time.monotonic() - began

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._file.close()


@contextmanager
def service(module: str, *arguments: str, log: Path, env: dict[str, str] | None = None) -> Iterator[Service]:
    started = Service(module, *arguments, log=log, env=env)
    try:
        yield started
    finally:
        started.close()


@contextmanager
def api(database: str, root: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[tuple[Service, int]]:
    """The API process and its port; not waited for."""
    port = free_port()
    common = ["--port", str(port), "--data-dir", str(root / "data"), "--database-url", database]
    with service("megido_api", *common, *arguments, log=root / "api.log", env=env) as started:
        yield started, port
