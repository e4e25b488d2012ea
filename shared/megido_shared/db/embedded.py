"""The embedded Postgres: a server of our own over a unix socket, started and stopped with its owner.

Works as an ordinary user and as root (see `postgres_exec`), needs no account, no port and no configuration.
"""

import fcntl
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import psycopg

from megido_shared.datadir import DataDir
from megido_shared.db import postgres_exec
from megido_shared.db.postgres_binaries import Installation, choose
from megido_shared.errors import ConfigurationError

DATABASE = "megido"
USER = "megido"

_PORT = 5432  # of no TCP port: it is part of the socket's name
_SOCKET_PATH_LIMIT = 107
_START_SECONDS = 60.0
_POLL = 0.02
_LOCK_FILE = "postgres.lock"
_KEEP_LOG = 4 << 20
_HBA = "# Only the unix socket, whose directory is its owner's alone.\nlocal all all trust\n"
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "cluster_name": "megido",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "jit": "off",  # short queries: compiling costs more than it saves
    "wal_level": "minimal",  # nobody replicates from it
    "max_wal_senders": "0",
}


class EmbeddedPostgres:
    """One server over `data_dir.postgres/pg<major>`.

    `installation`: which Postgres (found when None). `settings` are passed as `-c name=value`. With `durable`
    off nothing is synced: for tests only. One instance may use a data directory at a time. Start it from a
    thread that outlives the server: the kernel stops Postgres when that thread ends.
    """

    def __init__(
        self,
        data_dir: DataDir,
        *,
        installation: Installation | None = None,
        settings: Mapping[str, str] | None = None,
        durable: bool = True,
        env: Mapping[str, str] | None = None,
        modes: tuple[str, ...] | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._installation = installation
        self._settings = dict(_SETTINGS) | dict(settings or {})
        self._durable = durable
        if not durable:
            self._settings |= {"fsync": "off", "full_page_writes": "off"}
        self._env = dict(os.environ if env is None else env)
        self._modes = modes or _modes()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = -1
        self.log = data_dir.service_logs / "postgres.log"

    @property
    def pid(self) -> int | None:
        """The postmaster's, while it runs."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def find(self) -> Installation:
        """The installation that `start` will use. Raises ConfigurationError when there is none."""
        return self._installation or choose(self._data_dir.postgres, self._env)

    def start(self) -> str:
        """Starts the server, making its data directory on the first start. Returns when it takes connections,
        with the database's URL. Raises ConfigurationError; then nothing of it is left running."""
        installation = self.find()
        self._prepare()
        try:
            mode = self._usable_mode(installation)
            data = self._data_dir.postgres / f"pg{installation.major}"
            sockets = _socket_directory(self._data_dir)
            if not (data / "PG_VERSION").exists():
                self._initdb(installation, mode, data)
            _own(data, mode)
            _clear_orphan(data)
            self._launch(installation, mode, data, sockets)
        except BaseException:
            self.stop()
            raise
        return _url(sockets, DATABASE)

    def stop(self, patience: float = 10.0) -> None:
        """Stops the server: fast shutdown, after `patience` seconds an immediate one. Safe to call twice."""
        process = self._process
        if process is not None:
            for number, seconds in ((signal.SIGINT, patience), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
                if process.poll() is None:
                    process.send_signal(number)
                    try:
                        process.wait(seconds)
                    except subprocess.TimeoutExpired:
                        continue
        self._process = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _prepare(self) -> None:
        self._data_dir.ensure()
        try:
            for directory in (self._data_dir.postgres, self._data_dir.run, self._data_dir.service_logs):
                directory.mkdir(mode=0o700, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > _KEEP_LOG:
                self.log.replace(self.log.with_suffix(".log.1"))
            if self._lock < 0:
                self._lock = os.open(self._data_dir.run / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise ConfigurationError(
                f"the embedded Postgres of {self._data_dir.root} is in use by another megido; "
                "stop that one or choose another --data-dir"
            ) from None
        except OSError as error:
            raise ConfigurationError(
                f"data directory {self._data_dir.root} cannot be used ({error}); choose another with --data-dir"
            ) from error

    def _usable_mode(self, installation: Installation) -> str:
        """The first mode in which Postgres' program and the data directory can be reached."""
        reasons = []
        for mode in self._modes:
            command = self._command(mode, installation, "postgres", "--version")
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=self._child_env())
            if done.returncode == 0:
                return mode
            reasons.append((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
        raise ConfigurationError(
            f"Postgres cannot be started here ({'; '.join(reasons)}); "
            "run megido as an ordinary user or give --database-url"
        )

    def _command(self, mode: str, installation: Installation, program: str, *arguments: str) -> list[str]:
        stub = [sys.executable, "-I", "-S", postgres_exec.__file__, mode, str(os.getpid())]
        return [*stub, str(self._data_dir.postgres), str(installation.bin_dir / program), *arguments]

    def _child_env(self) -> dict[str, str]:
        """Without PG*: somebody's PGDATA or PGPORT is not ours."""
        return {name: value for name, value in self._env.items() if not name.startswith("PG")} | {"LC_ALL": "C"}

    def _initdb(self, installation: Installation, mode: str, data: Path) -> None:
        """Beside its final place and then renamed, so that a kill in between leaves no half cluster."""
        fresh = data.with_name(data.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        options = ["-D", str(fresh), "-U", USER, "-E", "UTF8", "--locale=C", "--auth=trust"]
        if not self._durable:
            options.append("--no-sync")
        command = self._command(mode, installation, "initdb", *options)
        with self.log.open("ab") as log:
            done = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._child_env()
            )
        if done.returncode != 0:
            raise ConfigurationError(
                f"the database could not be made in {data} ({_last_line(self.log)}); see {self.log}"
            )
        (fresh / "pg_hba.conf").write_text(_HBA)
        fresh.rename(data)

    def _launch(self, installation: Installation, mode: str, data: Path, sockets: Path) -> None:
        arguments = ["-D", str(data), "-k", str(sockets), "-p", str(_PORT)]
        for name, value in self._settings.items():
            arguments += ["-c", f"{name}={value}"]
        deadline = time.monotonic() + _START_SECONDS
        while True:
            begin = self.log.stat().st_size if self.log.exists() else 0
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(mode, installation, "postgres", *arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._child_env(),
                    start_new_session=True,
                )
            if self._wait_until_ready(sockets, deadline):
                return
            # Backends of a killed postmaster hold its shared memory for a moment.
            if self.running or b"shared memory" not in _read_from(self.log, begin) or time.monotonic() > deadline:
                raise ConfigurationError(f"Postgres did not start ({_last_line(self.log)}); see {self.log}")
            time.sleep(0.2)

    def _wait_until_ready(self, sockets: Path, deadline: float) -> bool:
        while self.running and time.monotonic() < deadline:
            try:
                with psycopg.connect(_url(sockets, "postgres"), autocommit=True, connect_timeout=5) as connection:
                    known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                    if known is None:
                        connection.execute(f"CREATE DATABASE {DATABASE}")
                return True
            except psycopg.OperationalError:
                time.sleep(_POLL)
        return False


def _modes() -> tuple[str, ...]:
    """Ways to run Postgres as who we are (see `postgres_exec`), preferred ones first."""
    if os.geteuid() == 0:
        return ("userns", "caps")
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:  # initdb wants a user with a name: 65534 has one
        return ("userns", "plain")
    return ("plain",)


def database_url(data_dir: DataDir) -> str:
    """Where the embedded database of a data directory is reached, while its server runs."""
    return _url(_socket_directory(data_dir), DATABASE)


def in_use(data_dir: DataDir) -> bool:
    """Whether somebody has an embedded server over this data directory now."""
    try:
        lock = os.open(data_dir.run / _LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _url(sockets: Path, database: str) -> str:
    return f"postgresql://{USER}@/{database}?host={quote(str(sockets), safe='/')}&port={_PORT}"


def _socket_directory(data_dir: DataDir) -> Path:
    """The data directory's `run`, or a short path of our own where that would exceed what a socket's name may have."""
    name = f".s.PGSQL.{_PORT}.lock"
    if len(os.fsencode(data_dir.run / name)) <= _SOCKET_PATH_LIMIT:
        return data_dir.run
    digest = hashlib.sha256(os.fsencode(data_dir.root.resolve())).hexdigest()[:12]
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    if len(os.fsencode(base)) > 60:
        base = Path("/tmp")  # noqa: S108 - made 0700 and checked below
    directory = base / f"megido-{os.geteuid()}-{digest}"
    directory.mkdir(mode=0o700, exist_ok=True)
    facts = directory.lstat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077 or directory.is_symlink():
        raise ConfigurationError(f"{directory} belongs to somebody else; choose a --data-dir with a shorter path")
    return directory


def _own(data: Path, mode: str) -> None:
    """Postgres wants to own its data: a mode other than last time's means another owner."""
    if mode == "plain":
        return
    wanted = postgres_exec.NOBODY if mode == "caps" else os.geteuid()
    if data.stat().st_uid == wanted and (data / "pg_hba.conf").stat().st_uid == wanted:
        return
    for path in (data, *data.rglob("*")):
        os.chown(path, wanted, wanted, follow_symlinks=False)


def _clear_orphan(data: Path) -> None:
    """We hold the lock, so a postmaster that is still there lost its owner: it is stopped. A pid file of one that
    is gone is removed, because its pid may by now be another process's."""
    pid_file = data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().splitlines()[0])
    except (FileNotFoundError, ValueError, IndexError):
        pid_file.unlink(missing_ok=True)
        return
    if _is_postmaster(pid, data):
        for number, seconds in ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            os.kill(pid, number)
            deadline = time.monotonic() + seconds
            while _is_postmaster(pid, data) and time.monotonic() < deadline:
                time.sleep(_POLL)
            if not _is_postmaster(pid, data):
                break
    pid_file.unlink(missing_ok=True)


def _is_postmaster(pid: int, data: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.path.basename(command[0]) == b"postgres" and os.fsencode(data) in command  # noqa: PTH119 - bytes


def _read_from(path: Path, begin: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read()


def _last_line(log: Path) -> str:
    """The last line that says what went wrong; Postgres adds hints and a line about its shutdown after it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in ("FATAL", "error:", "PANIC"))]
    return (telling or lines or ["no output"])[-1]
