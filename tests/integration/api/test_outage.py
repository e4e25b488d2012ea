"""Postgres stopped, frozen and started again; readers, writers and probes meanwhile. The API as a process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from megido_shared.datadir import DataDir
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate
from tests.integration.api.processes import Service, api
from tests.support.waiting import until


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(DataDir(tmp_path / "pg").ensure(), durable=False)
    try:
        yield server
    finally:
        server.stop()


class Running:
    def __init__(self, service: Service, port: int) -> None:
        self.service = service
        self.base = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **options: Any) -> tuple[int, float, httpx.Response]:
        """Status, seconds, answer."""
        began = time.monotonic()
        method = "POST" if options else "GET"
        answer = httpx.request(method, self.base + path, trust_env=False, timeout=30, **options)
        return answer.status_code, time.monotonic() - began, answer

    def status(self, path: str) -> int:
        return self.ask(path)[0]


@pytest.fixture
def running(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[Running]:
    url = postgres.start()
    migrate(url)
    with api(url, tmp_path) as (service, port):
        service.wait_ready(port)
        yield Running(service, port)


def expect_away(running: Running) -> None:
    paths = ["/proxy/api/requests/", "/proxy/api/requests/1/", "/proxy/api/stats/", "/proxy/api/errors/list/"]
    for path in paths:
        status, seconds, answer = running.ask(path)
        assert (status, answer.json()["error"]["code"]) == (503, "unavailable"), path
        assert int(answer.headers["retry-after"]) >= 1
        assert seconds < 2.0, path
    status, seconds, answer = running.ask("/proxy/api/errors/", json={"error_message": "x"})
    assert (status, answer.json()["error"]["code"]) == (503, "unavailable")
    assert seconds < 2.0
    assert running.status("/livez") == 200
    status, _, answer = running.ask("/readyz")
    assert (status, answer.json()["error"]["code"]) == (503, "not_ready")
    assert answer.json()["error"]["details"]["missing"][0].startswith("database: ")


def expect_back(running: Running, database: str) -> None:
    began = time.monotonic()
    until(lambda: running.status("/proxy/api/requests/") == 200, "requests answered again")
    assert time.monotonic() - began < 5.0
    until(lambda: running.status("/readyz") == 200, "readiness")
    status, _, _ = running.ask("/proxy/api/errors/", json={"error_message": "after the outage"})
    assert status == 201

    def relayed() -> bool:
        with psycopg.connect(database) as connection:
            return connection.execute("SELECT count(*) FROM outbox").fetchone() == (0,)

    until(relayed, "the outbox to be relayed again")


def test_stopped_and_started(running: Running, postgres: EmbeddedPostgres) -> None:
    postgres.stop()
    expect_away(running)
    url = postgres.start()
    expect_back(running, url)


def test_killed_and_started(running: Running, postgres: EmbeddedPostgres) -> None:
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGKILL)
    until(lambda: running.status("/proxy/api/stats/") == 503, "the loss to be noticed")
    expect_away(running)
    postgres.stop()
    expect_back(running, postgres.start())


def processes_of(postmaster: int) -> list[int]:
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return [postmaster, *(pid for child in children for pid in processes_of(int(child)))]


def test_frozen_and_thawed(running: Running, postgres: EmbeddedPostgres) -> None:
    """Connections stay open and say nothing: no request may wait for them."""
    running.status("/proxy/api/stats/")
    assert postgres.pid is not None
    frozen = processes_of(postgres.pid)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        expect_away(running)
    finally:
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
    expect_back(running, postgres.start() if not postgres.running else _url(postgres))


def _url(postgres: EmbeddedPostgres) -> str:
    from megido_shared.db.embedded import database_url

    return database_url(postgres._data_dir)


@pytest.mark.parametrize("how", ["running", "stopped", "frozen"])
def test_ends_cleanly_in_time(running: Running, postgres: EmbeddedPostgres, how: str) -> None:
    running.status("/proxy/api/stats/")
    assert postgres.pid is not None
    frozen = processes_of(postgres.pid) if how == "frozen" else []
    if how == "stopped":
        postgres.stop()
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        code, seconds = running.service.stop(15)
    finally:
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
    assert code == 0, running.service.output()
    assert seconds < 15
    assert "Traceback" not in running.service.output()


def test_starts_without_postgres_and_waits_for_it(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    url = postgres.start()
    postgres.stop()
    with api(url, tmp_path) as (service, port):
        running = Running(service, port)

        def listening() -> bool:
            try:
                return running.status("/livez") == 200
            except httpx.ConnectError:
                return False

        until(listening, "the API to listen")
        expect_away(running)
        assert "ready on" not in service.output()
        postgres.start()
        status, _, answer = running.ask("/proxy/api/stats/")
        assert (status, answer.json()["error"]["code"]) == (503, "not_migrated")
        migrate(url)
        service.wait_ready(port)
        until(lambda: "ready on" in service.output(), "the ready line")
        expect_back(running, url)
