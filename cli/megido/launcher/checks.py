"""What must hold before anything is started. Each failure is one line that says what to do."""

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError

_ORPHANS_SECONDS = 20.0


class Lock:
    """The data directory's one `megido up`. Holds until closed or until the process dies, however it dies."""

    def __init__(self, data_dir: DataDir) -> None:
        data_dir.ensure()
        try:
            data_dir.run.mkdir(mode=0o700, exist_ok=True)
            data_dir.service_logs.mkdir(mode=0o700, exist_ok=True)
            self._descriptor = os.open(data_dir.run / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"data directory {data_dir.root} cannot be used ({error.strerror}); choose another with --data-dir"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 20, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise ConfigurationError(
                f"data directory {data_dir.root} is in use by another megido up (pid {holder or 'unknown'}); "
                "stop that one or choose another with --data-dir"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def check_port(host: str, port: int, what: str, flag: str) -> None:
    """Without SO_REUSEPORT, with which a second start would share the port in silence. Raises ConfigurationError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # On Linux this passes over connections that linger, never over a socket that listens.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            why = "is in use" if error.errno == 98 else f"cannot be used ({error.strerror})"
            raise ConfigurationError(
                f"port {port} for {what} {why}; stop what listens there or choose another with {flag}"
            ) from error


def check_log_dir(directory: Path) -> None:
    """Makes it, 0700. Raises ConfigurationError when it cannot be made or written."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"log directory {directory} cannot be written ({error.strerror}); choose another with --log-dir"
        ) from error


def free_port(preferred: int) -> int:
    """On loopback: the preferred one, or whatever is free."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen(1)
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigurationError("no free port on 127.0.0.1")


class Children:
    """The pids of what runs, on disk, so that the next start can wait for what a killed launcher left to end."""

    def __init__(self, data_dir: DataDir) -> None:
        self._path = data_dir.run / "children.json"

    def write(self, pids: Iterable[int]) -> None:
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps({str(pid): born for pid in pids if (born := _born(pid))}))
        beside.replace(self._path)

    def wait_for_orphans(self) -> None:
        """They were told to stop when their launcher died, and hold ports until they have; those that do not are
        killed."""
        try:
            known = {int(pid): str(born) for pid, born in json.loads(self._path.read_text()).items()}
        except (FileNotFoundError, ValueError):
            return
        deadline = time.monotonic() + _ORPHANS_SECONDS
        while alive := [pid for pid, born in known.items() if _born(pid) == born]:
            if time.monotonic() > deadline:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self._path.unlink(missing_ok=True)


def _born(pid: int) -> str:
    """The start time in clock ticks, which tells a process from a later one with its pid; "" when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
