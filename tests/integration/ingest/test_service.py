"""The real process: ready, stopping, and waiting for what is away."""

import itertools
import time
from pathlib import Path

import pytest

from megido_shared import events
from megido_shared.bus.local import Journal
from megido_shared.datadir import DataDir
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate
from megido_shared.testing import a_completed_flow
from tests.integration.ingest.process import IngestProcess, append
from tests.integration.ingest.support import rows
from tests.support.waiting import until

_seq = itertools.count(1)


def _flows(count: int) -> list[events.AnyEvent]:
    return [a_completed_flow(seq=next(_seq)) for _ in range(count)]


def _stored(url: str) -> int:
    return int(rows(url, "SELECT count(*) FROM flows")[0][0])


def test_a_flow_can_be_found_within_a_second_and_metrics_tell(database: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    journal = Journal.open(DataDir(data_dir), "capture")
    process = IngestProcess(database, data_dir)
    try:
        process.wait_ready()
        waits = []
        for n in range(5):
            begun = time.monotonic()
            append(journal, _flows(1))
            until(lambda n=n: _stored(database) == n + 1, "the flow is stored", every=0.01)  # type: ignore[misc]
            waits.append(time.monotonic() - begun)
        # The machine may be busy; the usual wait is what is promised.
        assert sorted(waits)[2] < 1.0, waits
        assert process.get("/readyz") == (200, "ready\n")
        until(lambda: "megido_ingest_lag_bytes{" in process.get("/metrics")[1], "the lag was looked at")
        metrics = process.get("/metrics")[1]
        assert 'megido_ingest_records_stored_total{kind="flow"} 5.0' in metrics
        assert "megido_ingest_batch_seconds_bucket" in metrics
        assert 'megido_ingest_lag_bytes{topic="megido.flows"}' in metrics
        assert "megido_ingest_lag_seconds" in metrics
        assert process.terminate() == 0, process.output
    finally:
        process.close()
        journal.close()


def test_postgres_away_at_the_start_and_later_loses_nothing(tmp_path: Path) -> None:
    server = EmbeddedPostgres(DataDir(tmp_path / "server").ensure(), durable=False)
    url = server.start()
    migrate(url)
    server.stop()
    data_dir = tmp_path / "run" / "data"
    journal = Journal.open(DataDir(data_dir), "capture")
    append(journal, _flows(50))
    process = IngestProcess(url, data_dir)
    try:
        until(lambda: "waiting" in process.output, "it says that it waits", seconds=60)
        assert "cannot be reached" in process.output
        status, missing = until(
            lambda: process.get("/readyz") if "127.0.0.1" in process.output else (503, "database"), "an answer"
        )
        assert (status, "database" in missing) == (503, True)
        server.start()
        process.wait_ready()
        until(lambda: _stored(url) == 50, "what had waited is stored")
        server.stop()
        append(journal, _flows(50))
        until(lambda: process.get("/readyz")[0] == 503, "not ready without a database")
        assert process.get("/livez")[0] == 200
        server.start()
        until(lambda: _stored(url) == 100, "stored within seconds of its return", seconds=15)
        until(lambda: process.get("/readyz")[0] == 200, "ready again")
        server.stop()
        assert process.terminate() == 0, process.output
    finally:
        process.close()
        journal.close()
        server.stop()


def test_sessions_that_the_server_ends_are_opened_again(database: str, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    journal = Journal.open(DataDir(data_dir), "capture")
    process = IngestProcess(database, data_dir)
    try:
        process.wait_ready()
        for round_ in range(1, 4):
            rows(
                database,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name ~ '^megido' AND datname = current_database()",
            )
            append(journal, _flows(20))
            until(lambda n=round_: _stored(database) == 20 * n, "stored after the cut", seconds=15)  # type: ignore[misc]
        assert process.terminate() == 0, process.output
    finally:
        process.close()
        journal.close()


@pytest.mark.parametrize(
    ("case", "arguments", "said"),
    [
        ("no database", ["--metrics-port", "0"], "--database-url"),
        ("no Postgres", ["--database-url", "mysql://x/y"], "postgresql://"),
    ],
)
def test_bad_configuration_is_one_line_and_exit_2(
    case: str, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megido_ingest.__main__ import main

    assert main(["--data-dir", str(tmp_path), *arguments]) == 2, case
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megido:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_database_without_our_schema_is_one_line_and_exit_2(empty_database: str, tmp_path: Path) -> None:
    process = IngestProcess(empty_database, tmp_path / "data")
    try:
        assert process.exit_code(60) == 2
        assert "run: megido migrate" in process.output
        assert "Traceback" not in process.output
    finally:
        process.close()
