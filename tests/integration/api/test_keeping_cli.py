"""`megido logs` and `megido retention` against the real services."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megido.main import main
from megido_shared import events
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.api.processes import api
from tests.integration.ingest.process import IngestProcess, journal_of
from tests.integration.ingest.support import rows
from tests.integration.retention.history import an_id, moment
from tests.support.waiting import until


@pytest.fixture
def address(database: str, tmp_path: Path) -> Iterator[str]:
    """Of an API beside the real ingest, which stored three flows of today and two of six days ago, and logged them as
    lines."""
    made: list[events.AnyEvent | bytes] = []
    for seq, days_ago in enumerate((0, 0, 0, 6, 6), 1):
        when = moment(days_ago)
        time_us = int(when.timestamp() * 1e6)
        request = a_request(host=f"h{seq}.example")
        made.append(a_completed_flow(seq=seq, flow_id=an_id(when), time_us=time_us, request=request))
    journal_of(tmp_path / "data", made)
    ingest = IngestProcess(database, tmp_path / "data", arguments=["--log-layout", "ndjson"])
    try:
        with api(database, tmp_path, "--log-dir", str(tmp_path / "logs")) as (service, port):
            service.wait_ready(port)
            logged = (
                "SELECT count(*) FROM feed_cursors WHERE left(reader, 9) = 'json-logs'"
                " AND seq = (SELECT max(seq) FROM feed)"
            )
            until(lambda: rows(database, "SELECT count(*) FROM flows")[0][0] == 5, "flows", seconds=60)
            until(lambda: rows(database, logged)[0][0] > 0, "log files", seconds=60)
            yield f"http://127.0.0.1:{port}"
    finally:
        ingest.close()


def test_logs_and_retention(address: str, database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def megido(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([*arguments, "--api-url", address]) == code
        shown = capsys.readouterr()
        return shown.out + shown.err

    heading, *lines = megido("logs", "recent").splitlines()
    assert heading.split() == ["TIME", "ID", "METHOD", "URL", "SOURCE", "IP"]
    assert len(lines) == 5
    newest = json.loads(megido("logs", "recent", "responses", "--limit", "1", "--json"))
    assert newest["type"] == "response"
    assert "no errors log" in megido("logs", "recent", "errors")
    assert "no type of log" in megido("logs", "recent", "nothing", code=2)
    assert "4 files" not in megido("logs", "clean", "--days", "30", "--dry-run")
    assert megido("logs", "clean", "--days", "3", "--dry-run").startswith("2 files with")
    assert len(list((tmp_path / "logs").rglob("*.ndjson"))) == 4
    assert megido("logs", "clean", "--days", "3").startswith("2 files with")
    assert len(list((tmp_path / "logs").rglob("*.ndjson"))) == 2

    assert "no limit" in megido("retention", "show")
    changed = megido("retention", "set", "days=3", "max_bytes=20GiB", "every_minutes=0")
    assert "20.0 GiB" in changed
    assert "on Kafka, keep more days than the topics do" in changed
    for bad in ("weeks=3", "days=x", "days", "max_bytes=big"):
        megido("retention", "set", bad, code=2)
    old = rows(database, "SELECT id FROM flows ORDER BY flow_id LIMIT 2")
    assert megido("retention", "pin", str(old[0][0])).strip() == f"{old[0][0]} is pinned"
    assert "example" in megido("retention", "pins")
    dry = megido("retention", "run", "--dry-run")
    assert f"{moment(6).date().isoformat()}  age" in dry
    assert "would remove: 1 days" in dry
    assert rows(database, "SELECT count(*) FROM flows") == [(5,)]
    assert "removed: 1 days" in megido("retention", "run")
    assert rows(database, "SELECT count(*) FROM flows") == [(4,)]
    megido("retention", "unpin", str(old[0][0]))
    assert "no flow is pinned" in megido("retention", "pins")
    assert json.loads(megido("retention", "run", "--json"))["report"]["days"][0]["rows"]["flows"] == 1
    assert len(megido("retention", "runs").splitlines()) == 7, "headings, three runs and three clean-ups of log files"
    megido("retention", "pin", "999999", code=1)
