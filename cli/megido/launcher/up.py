"""Starting, watching and stopping everything, in order."""

import os
import select
import signal
import sys
import time
import webbrowser
from types import FrameType

from megido.launcher import screen
from megido.launcher.checks import Children, Lock, check_log_dir, check_port
from megido.launcher.options import UpOptions
from megido.launcher.plan import API, CAPTURE, INGEST, LAGS, STOP_ORDER, specs
from megido.launcher.process import Child
from megido.terminal import note, safe_line, write
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.errors import ConfigurationError, MegidoError, Unavailable
from megido_shared.settings import Common

_READY_SECONDS = 60.0
_STOP_SECONDS = 15.0
"""What every service promises: none is killed before. With both drains and Postgres all is over within 75 s, and
systemd gives 90."""
_HASTY_SECONDS = 6.0
"""The same after a second signal, which the services get too: then they wait for nobody."""
_DRAIN_SECONDS = 10.0
_LAG_SAMPLE_SECONDS = 1.2
"""Lags are looked at every second: only then is the figure younger than the last event."""


class _Stop(Exception):
    """A signal came while something was being started."""


def run(options: UpOptions) -> int:
    """Until Ctrl-C or SIGTERM: 0. Raises MegidoError when it cannot start; nothing is left running then."""
    postgres = _embedded(options)
    lock = Lock(options.common.data_dir)
    try:
        children = Children(options.common.data_dir)
        children.wait_for_orphans()
        if options.runs(CAPTURE):
            check_port("127.0.0.1", options.proxy_port, "the proxy", "--proxy-port")
        if options.runs(API):
            check_port("127.0.0.1", options.api_port, "the API", "--api-port")
        if options.runs(INGEST):
            check_log_dir(options.log_dir)
        if postgres is not None:
            postgres.find()
        return Launcher(options, postgres, children).run()
    finally:
        lock.close()


def _embedded(options: UpOptions) -> EmbeddedPostgres | None:
    if options.common.database_url or not options.needs_database:
        return None
    return EmbeddedPostgres(options.common.data_dir)


class Launcher:
    def __init__(self, options: UpOptions, postgres: EmbeddedPostgres | None, children: Children) -> None:
        self._options = options
        self._postgres = postgres
        self._known = children
        self._children: dict[str, Child] = {}
        self._stops = 0
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._postgres_retry = 0.0

    def run(self) -> int:
        began = time.monotonic()
        self._handle_signals()
        try:
            self._start()
            self._wait_until_ready()
            write(self._screen(time.monotonic() - began))
            sys.stdout.flush()
            self._open_browser()
            self._watch()
        except _Stop:
            pass
        finally:
            self._stop()
        return 0

    # Signals: the handler counts; everything else happens in the loop, which the pipe wakes.

    def _handle_signals(self) -> None:
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _wait(self, seconds: float) -> None:
        """Until a signal, the end of a child, or the time."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for child in self._children.values():
            if child.running:
                poll.register(child.pidfd, select.POLLIN)
        if any(descriptor == self._wake for descriptor, _ in poll.poll(max(0.0, seconds) * 1000)):
            os.read(self._wake, 64)

    def _check(self) -> None:
        """While things are being started: nobody wants a stop, and nobody has failed."""
        if self._stops:
            raise _Stop
        for child in self._children.values():
            if not child.running:
                raise _could_not_start(child)

    # Starting

    def _start(self) -> None:
        """The proxy needs neither database nor topics, so it loads while those come up."""
        plan = {spec.name: spec for spec in specs(self._options)}
        environment = {**self._options.environment, "PYTHONUNBUFFERED": "1"}
        logs = self._options.common.data_dir.service_logs

        def start(name: str, more: dict[str, str]) -> None:
            self._check()
            if name in plan:
                child = self._children[name] = Child(plan[name], logs / f"{name}.log", environment | more)
                child.start()
                self._remember()

        start(CAPTURE, {})
        database = {}
        if self._options.needs_database:
            url = self._options.common.database_url
            if self._postgres is not None:
                url = self._postgres.start()
                self._remember()
            self._check()
            self._migrate(url)
            database = {"MEGIDO_DATABASE_URL": url}
        for name in (INGEST, API, *(name for name in plan if name not in (CAPTURE, INGEST, API))):
            start(name, database)

    def _migrate(self, url: str) -> None:
        from megido.migrating import create_topics, migrate_schema  # noqa: PLC0415 - slow to load; capture starts first

        migrate_schema(url)
        self._check()
        create_topics(Common(self._options.common.data_dir, self._options.common.kafka, url))

    def _remember(self) -> None:
        pids = [child.pid for child in self._children.values() if child.pid is not None]
        if self._postgres is not None and self._postgres.pid is not None:
            pids.append(self._postgres.pid)
        self._known.write(pids)

    def _wait_until_ready(self) -> None:
        waiting = dict(self._children)
        deadline = time.monotonic() + _READY_SECONDS
        reasons: dict[str, str] = {}
        while waiting:
            self._check()
            for name, child in list(waiting.items()):
                reasons[name] = child.missing()
                if not reasons[name]:
                    del waiting[name]
            if waiting and time.monotonic() > deadline:
                name, child = next(iter(waiting.items()))
                raise Unavailable(
                    f"{name} is not ready after {_READY_SECONDS:.0f} s ({reasons.get(name)}); its log: {child.log}"
                )
            if waiting:
                self._wait(0.05)

    def _screen(self, seconds: float) -> str:
        options = self._options
        database = screen.external_database(options.common.database_url)
        if self._postgres is not None:
            database = f"{options.common.data_dir.postgres} (embedded Postgres {self._postgres.find().major})"
        ports = {name: child.port for name, child in self._children.items()}
        return screen.render(options, database=database, ports=ports, seconds=seconds)

    def _open_browser(self) -> None:
        shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if self._options.open_browser and sys.stdout.isatty() and shown:
            webbrowser.open(f"http://127.0.0.1:{self._options.api_port}/")

    # Watching

    def _watch(self) -> None:
        while not self._stops:
            now = time.monotonic()
            self._watch_postgres(now)
            for child in self._children.values():
                if child.restart_at:
                    if now >= child.restart_at:
                        child.start()
                        self._remember()
                elif not child.running:
                    note(f"{child.name} ended ({_how(child.ended())}); starting it again; its log: {child.log}")
            due = [child.restart_at for child in self._children.values() if child.restart_at]
            self._wait(min([1.0, *(at - time.monotonic() for at in due)]))

    def _watch_postgres(self, now: float) -> None:
        if self._postgres is None or self._postgres.running or now < self._postgres_retry:
            return
        note(f"Postgres ended; starting it again; its log: {self._postgres.log}")
        try:
            self._postgres.start()
            self._remember()
        except ConfigurationError as error:
            note(str(error))
            self._postgres_retry = time.monotonic() + 10.0

    # Stopping

    def _stop(self) -> None:
        """What makes events first, what stores them after it has caught up, Postgres last."""
        if self._stops:
            note("stopping; what is on its way is stored first")
        for names in STOP_ORDER:
            children = [self._children[name] for name in names if name in self._children]
            for child in children:
                if child.name in LAGS:
                    self._drain(child, LAGS[child.name])
            self._end(children)
        if self._postgres is not None:
            self._postgres.stop(patience=_HASTY_SECONDS if self._hasty else 10.0)
        self._known.write([])

    @property
    def _hasty(self) -> bool:
        """A second signal: whoever sends it does not want to wait. Nothing is lost, the journals keep it."""
        return self._stops > 1

    def _drain(self, child: Child, metric: str) -> None:
        """Until its backlog is gone. One that cannot work now is not waited for: the journals keep it."""
        begun = time.monotonic()
        while child.running and not self._hasty and not child.missing():
            waited = time.monotonic() - begun
            if waited >= _DRAIN_SECONDS or (waited >= _LAG_SAMPLE_SECONDS and not child.metric_sum(metric)):
                return
            self._wait(0.1)

    def _end(self, children: list[Child]) -> None:
        begun, hastened = time.monotonic(), False
        for child in children:
            child.signal(signal.SIGTERM)
        while running := [child for child in children if child.running]:
            if self._hasty and not hastened:
                hastened, begun = True, time.monotonic()
            for child in running if hastened else []:
                child.signal(signal.SIGTERM)  # each turn: of two that follow one another closely, one is seen
            limit = _HASTY_SECONDS if hastened else _STOP_SECONDS
            left = begun + limit - time.monotonic()
            if left <= 0:
                for child in running:
                    note(f"{child.name} did not stop within {limit:.0f} s and is killed; its log: {child.log}")
                break
            self._wait(min(left, 0.5))
        for child in children:
            child.kill()


def _could_not_start(child: Child) -> MegidoError:
    """Its own words on the terminal, and its own exit code."""
    code = child.exit_code or 1
    lines = child.last_lines()
    for line in lines[:-1] if code != ConfigurationError.exit_code else []:
        note(f"{child.name}: {safe_line(line)}")
    last = safe_line(lines[-1]).removeprefix("megido: ") if lines else f"it ended ({_how(code)})"
    text = f"{child.name} cannot start: {last}; its log: {child.log}"
    return ConfigurationError(text) if code == ConfigurationError.exit_code else MegidoError(text)


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
