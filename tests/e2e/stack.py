"""`megido up` as a person runs it, on free ports, with the ways to look at what it recorded."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.waiting import until

MEGIDO = Path(sys.executable).with_name("megido")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """What a person's shell has, without settings of Megido or proxies."""
    dropped = ("MEGIDO_", "PROXY_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


@dataclass
class Stack:
    root: Path
    kafka: str = ""
    options: list[str] = field(default_factory=list)
    proxy_port: int = field(default_factory=free_port)
    api_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    ready_s: float = 0.0

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    @property
    def log_dir(self) -> Path:
        return self.root / "logs" / "proxy"

    @property
    def screen_file(self) -> Path:
        return self.root / "screen.txt"

    @property
    def proxy(self) -> str:
        return f"http://127.0.0.1:{self.proxy_port}"

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def ca(self) -> Path:
        return self.data_dir / "ca" / "mitmproxy-ca-cert.pem"

    def start(self) -> None:
        """Returns when the one screen has been printed: everything is ready."""
        command = [MEGIDO, "up", "--no-browser", "--data-dir", self.data_dir, "--log-dir", self.log_dir]
        command += ["--proxy-port", str(self.proxy_port), "--api-port", str(self.api_port)]
        if self.kafka:
            command += ["--kafka", self.kafka]
        began = time.monotonic()
        with self.screen_file.open("wb") as screen:
            self.process = subprocess.Popen(
                [*map(str, command), *self.options],
                stdout=screen,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                env=clean_environment(),
                start_new_session=True,
            )
        until(self._ready, "megido up is ready", seconds=60, every=0.02)
        self.ready_s = time.monotonic() - began

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"megido up ended:\n{self.screen()}\n{self.service_logs()}"
        return "curl" in self.screen() and self.get("/readyz", expect=(200, 503))[0] == 200

    def screen(self) -> str:
        return self.screen_file.read_text(encoding="utf-8", errors="replace")

    def service_logs(self) -> str:
        logs = sorted((self.data_dir / "service-logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=30)

    def get(self, path: str, expect: tuple[int, ...] = (200,)) -> tuple[int, Any]:
        """Status and parsed JSON (or text) of the API."""
        return self._call(urllib.request.Request(self.api + path), expect)

    def post(self, path: str, document: Any, expect: tuple[int, ...] = (200, 201)) -> tuple[int, Any]:
        body = json.dumps(document).encode()
        request = urllib.request.Request(self.api + path, data=body, headers={"Content-Type": "application/json"})
        return self._call(request, expect)

    @staticmethod
    def _call(request: urllib.request.Request, expect: tuple[int, ...]) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, raw = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, raw = error.code, error.read()
        except (urllib.error.URLError, ConnectionError) as error:
            status, raw = 503, str(error).encode()
        assert status in expect, f"{request.full_url}: {status} {raw[:500]!r}"
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, raw.decode(errors="replace")

    def requests(self, search: str, **filters: str) -> list[dict[str, Any]]:
        """The API's list, newest first."""
        query = urllib.parse.urlencode({"search": search, "limit": "1000"} | filters)
        found: list[dict[str, Any]] = self.get(f"/proxy/api/requests/?{query}")[1]["requests"]
        return found

    def wait_for(self, search: str, count: int = 1, **filters: str) -> list[dict[str, Any]]:
        """Flows whose URL has `search`, once there are `count` that have ended; fails when there are more."""

        def ended() -> list[dict[str, Any]]:
            found = self.requests(search, **filters)
            assert len(found) <= count, f"more than {count} flows for {search}: {found}"
            return found if len(found) == count else []

        return until(ended, f"{count} flows for {search}\n{self.service_logs()}")

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The `megido` command against this stack's API."""
        environment = clean_environment() | {"MEGIDO_API_URL": self.api}
        done = subprocess.run(
            [MEGIDO, *arguments], capture_output=True, text=True, timeout=60, env=environment, cwd=self.root
        )
        assert not check or done.returncode == 0, f"megido {arguments}: {done.stdout}{done.stderr}"
        return done

    def log_files(self, kind: str) -> list[dict[str, Any]]:
        """The JSON documents of one kind in the log tree."""
        return [json.loads(path.read_text()) for path in sorted((self.log_dir / kind).rglob("*.json"))]

    def wait_for_log(self, kind: str, url_part: str, count: int = 1) -> list[dict[str, Any]]:
        def written() -> list[dict[str, Any]]:
            found = [entry for entry in self.log_files(kind) if url_part in str(entry.get("url", ""))]
            assert len(found) <= count, f"more than {count} {kind} logs for {url_part}: {found}"
            return found if len(found) == count else []

        return until(written, f"{count} {kind} logs for {url_part}")

    def curl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """curl through the proxy, trusting its certificate authority, ignoring proxies of the environment."""
        command = ["curl", "-sS", "--max-time", "30", "--noproxy", "", "--proxy", self.proxy, "--cacert", str(self.ca)]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=40, env=clean_environment()
        )
        assert not check or done.returncode == 0, f"curl {arguments}: {done.stderr}"
        return done
