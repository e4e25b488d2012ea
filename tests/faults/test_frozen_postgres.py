"""SIGTERM while Postgres is frozen: its connections are open and say nothing, and nothing may wait for them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megido_shared import events
from megido_shared.datadir import DataDir
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate
from tests.faults.balance import SEED, ending, settle_items
from tests.integration.api.processes import Service, service
from tests.integration.api.test_outage import processes_of
from tests.integration.ingest.process import IngestProcess, journal_of
from tests.integration.ingest.support import rows
from tests.integration.ingest.traffic import mixed_traffic
from tests.support.waiting import until


@contextmanager
def frozen(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Its connections are open and say nothing."""
    assert postgres.pid is not None
    pids = processes_of(postgres.pid)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)


def _ready(started: Service) -> bool:
    assert started.process.poll() is None, started.output()
    return "ready" in started.output()


def _stored_at_last(url: str, data_dir: Path, items: list[events.AnyEvent | bytes]) -> None:
    again = IngestProcess(url, data_dir)
    try:
        again.wait_ready()
        query = "SELECT coalesce(sum(value), 0)::bigint FROM accounting WHERE kind IN ('stored', 'dead_lettered')"
        until(lambda: rows(url, query) >= [(ending(items),)], "all is stored", seconds=60)
        settle_items(items, url)
        assert again.terminate() == 0, again.output
    finally:
        again.close()


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("megido_ingest", ["--metrics-port", "0", "--log-dir", "logs"]),
        ("megido_replayer", ["--metrics-port", "0"]),
    ],
)
def test_a_service_ends_in_time(module: str, more: list[str], tmp_path: Path) -> None:
    """What ingest was about to store, its next start stores."""
    items = mixed_traffic(SEED, 300)
    postgres = EmbeddedPostgres(DataDir(tmp_path / "pg").ensure(), durable=False)
    try:
        url = postgres.start()
        migrate(url)
        given = [str(tmp_path / one) if one == "logs" else one for one in more]
        common = ["--data-dir", str(tmp_path / "data"), "--database-url", url]
        with service(module, *common, *given, log=tmp_path / "service.log") as started:
            until(lambda: _ready(started), "readiness", seconds=60)
            with frozen(postgres):
                journal_of(tmp_path / "data", items)
                code, seconds = started.stop(20)
            assert code == 0, started.output()
            assert seconds < 15
            assert "Traceback" not in started.output()
        if module == "megido_ingest":
            _stored_at_last(url, tmp_path / "data", items)
    finally:
        postgres.stop()
