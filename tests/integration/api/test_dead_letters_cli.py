"""`megido dead-letters` against the real services."""

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from megido.main import main
from megido_shared import events
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.api.processes import api
from tests.integration.ingest.process import IngestProcess, journal_of
from tests.integration.ingest.support import rows
from tests.support.waiting import until


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture
def address(database: str, tmp_path: Path) -> Iterator[str]:
    """Of an API whose database has three dead letters: two flows that would be stored now, and junk."""
    execute(database, "ALTER TABLE flows ADD CONSTRAINT refused CHECK (host <> 'refused.example')")
    flows: list[events.AnyEvent] = [
        a_completed_flow(seq=seq, request=a_request(host="refused.example")) for seq in (1, 2)
    ]
    journal_of(tmp_path / "data", [*flows, b"\xc1\x1b[31m junk"])
    ingest = IngestProcess(database, tmp_path / "data")
    try:
        with api(database, tmp_path) as (service, port):
            service.wait_ready(port)
            until(lambda: rows(database, "SELECT count(*) FROM dead_letters")[0][0] == 3, "dead letters", seconds=60)
            execute(database, "ALTER TABLE flows DROP CONSTRAINT refused")
            yield f"http://127.0.0.1:{port}"
    finally:
        ingest.close()


def test_listed_shown_redriven_discarded(address: str, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    def megido(*arguments: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["dead-letters", *arguments, "--api-url", address]) == code
        shown = capsys.readouterr()
        return shown.out, shown.err

    heading, *lines = megido("list")[0].splitlines()
    assert heading.split() == ["ID", "TIME", "STATE", "TRIES", "TOPIC", "TYPE", "SIZE", "REASON"]
    assert len(lines) == 3
    (junk,) = [json.loads(line) for line in megido("list", "--json", "--reason", "malformed")[0].splitlines()]
    assert "\x1b" not in megido("show", str(junk["id"]))[0]
    assert json.loads(megido("show", str(junk["id"]), "--json")[0])["value_base64"]
    (one, other) = [json.loads(line)["id"] for line in megido("list", "--json", "--reason", "violates")[0].splitlines()]
    assert "refused.example" in megido("show", str(one))[0]

    assert "1 on their way" in megido("redrive", str(one))[1]
    until(lambda: rows(database, "SELECT count(*) FROM flows")[0][0] == 1, "the first is stored")
    assert "1 on their way" in megido("redrive", "--topic", "megido.flows", "--reason", "violates")[1]
    until(lambda: rows(database, "SELECT count(*) FROM flows")[0][0] == 2, "the other is stored")
    assert len(megido("list", "--state", "redriven")[0].splitlines()) == 3
    assert "has been redriven" in megido("redrive", str(other), code=1)[1]
    assert "1 discarded" in megido("discard", str(junk["id"]))[1]
    assert json.loads(megido("redrive", "--all", "--json")[0]) == {"queued": 0, "too_large": 0}
    assert "no dead letter matches" in megido("list", "--state", "new")[1]

    for arguments, says in (
        (["redrive"], "say --all"),
        (["redrive", "1", "--all"], "say --all"),
        (["redrive", "--state", "redriven"], "must be one of new, queued, discarded"),
        (["list", "--state", "gone"], "must be one of new"),
    ):
        (line,) = megido(*arguments, code=2)[1].splitlines()
        assert line.startswith("megido: ") and says in line
    for command in ("show", "redrive", "discard"):
        (line,) = megido(command, "999999", code=1)[1].splitlines()
        assert "no dead letter has the id 999999" in line
