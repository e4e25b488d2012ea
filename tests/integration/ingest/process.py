"""The real `megido ingest` process."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

from megido_shared import events
from megido_shared.bus.local import Journal
from megido_shared.datadir import DataDir
from tests.support.waiting import until


class IngestProcess:
    """Started at once, over the local bus or Kafka; `failpoint` is MEGIDO_FAILPOINT."""

    def __init__(
        self, url: str, data_dir: Path, *, kafka: str = "", failpoint: str = "", arguments: Sequence[str] = (),
        kafka_prefix: str = "",
    ) -> None:  # fmt: skip
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        self._output = data_dir.parent / f"ingest-{len(list(data_dir.parent.glob('ingest-*')))}.log"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MEGIDO_", "PROXY_"))}
        if failpoint:
            env["MEGIDO_FAILPOINT"] = failpoint
        command = [
            sys.executable, "-m", "megido_ingest", "--data-dir", str(data_dir), "--database-url", url,
            "--metrics-port", "0", "--log-dir", str(data_dir.parent / "logs"),
        ]  # fmt: skip
        command += ["--kafka", kafka] if kafka else []
        command += arguments
        if kafka_prefix:
            env["MEGIDO_KAFKA_PREFIX"] = kafka_prefix
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        until(lambda: "is ready" in self.output or self._process.poll() is not None, "ingest is ready", seconds=60)
        assert self._process.poll() is None, self.output

    def get(self, path: str) -> tuple[int, str]:
        """An answer of the ops server."""
        found = re.search(r"http://(127\.0\.0\.1:\d+)", self.output)
        assert found, self.output
        try:
            with urllib.request.urlopen(f"http://{found[1]}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_killed(self) -> None:
        """For the failpoint."""
        code = self._process.wait(60)
        assert code == -signal.SIGKILL, (code, self.output)

    def wait_stopped(self) -> None:
        """Until the kernel says that the process is stopped (state T)."""
        status = Path(f"/proc/{self.pid}/stat")
        until(lambda: status.read_text().rsplit(") ", 1)[1][0] == "T", "the process is stopped", seconds=60)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def terminate(self) -> int:
        """SIGTERM; returns the exit code. Fails past the 15 s that a service may take."""
        self._process.terminate()
        return self._process.wait(15)

    def exit_code(self, seconds: float = 30) -> int:
        return self._process.wait(seconds)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def journal_of(data_dir: Path, items: Iterable[events.AnyEvent | bytes], name: str = "capture") -> None:
    """Writes a journal as a producer does, and closes it."""
    journal = Journal.open(DataDir(data_dir), name)
    append(journal, items)
    journal.close()


def append(journal: Journal, items: Iterable[events.AnyEvent | bytes]) -> None:
    for item in items:
        if isinstance(item, bytes):
            assert journal.append("megido.flows", b"junk", item)
        else:
            assert journal.publish(item)
