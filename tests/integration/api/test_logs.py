"""`/proxy/api/logs/`, over files that the real writer wrote."""

import dataclasses
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from megido_api.settings import Settings
from megido_shared.db import tables
from tests.integration.api.harness import Api, running
from tests.integration.jsonlogs.rows import MOMENT, Store, an_error
from tests.integration.jsonlogs.running import write_all
from tests.integration.jsonlogs.test_place import configure

LOGS = "/proxy/api/logs/"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "proxy"


@pytest.fixture
async def logging_api(settings: Settings, root: Path) -> AsyncIterator[Api]:
    async with running(dataclasses.replace(settings, log_dir=root)) as found:
        yield found


async def test_recent_entries_of_both_layouts(logging_api: Api, database: str, root: Path) -> None:
    store = Store(database)
    first = store.flow()
    store.row(tables.errors, **an_error())
    assert (await logging_api.get(LOGS))["readable"] is False
    await write_all(store, root, "tree")
    second = store.flow(started_at=MOMENT + timedelta(seconds=1))
    await write_all(store, root, "ndjson")
    found = await logging_api.get(LOGS, type="requests", limit=10)
    assert [entry["flow_id"] for entry in found["logs"]] == [second.hex, first.hex]
    assert found["truncated"] is False
    assert (found["type"], found["limit"], found["directory"], found["readable"]) == ("requests", 10, str(root), True)
    assert [entry["flow_id"] for entry in (await logging_api.get(LOGS, limit=1))["logs"]] == [second.hex]
    assert (await logging_api.get(LOGS, type="errors"))["logs"][0]["error_type"] == "TIMEOUT"
    (line,) = (await logging_api.get(f"{LOGS}general/"))["lines"]
    assert "ERROR TIMEOUT" in line
    for bad in ("type=../requests", "limit=0", "limit=1001", "path=/etc"):
        await logging_api.get(f"{LOGS}?{bad}", status=400)


async def test_the_configured_folder_is_the_one_that_is_read(logging_api: Api, database: str, root: Path) -> None:
    store = Store(database)
    configure(store, "team/a")
    flow_id = store.flow()
    await write_all(store, root, "ndjson")
    found = await logging_api.get(LOGS)
    assert ([entry["flow_id"] for entry in found["logs"]], found["directory"]) == ([flow_id.hex], str(root / "team/a"))
    configure(store, "../elsewhere")
    assert (await logging_api.get(LOGS))["directory"] == str(root)


async def test_clean_up_by_age(logging_api: Api, database: str, root: Path, tmp_path: Path) -> None:
    store = Store(database)
    store.flows([{}, {"started_at": MOMENT + timedelta(hours=1)}])
    await write_all(store, root, "tree")
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "143052_123456_GET.json"
    victim.touch()
    (root / "requests" / "20260101").symlink_to(outside)
    dry = await logging_api.post(f"{LOGS}cleanup/", {"days_to_keep": 7, "dry_run": True}, status=200)
    assert (dry["removed"], dry["hours"], dry["dry_run"]) == (4, ["2026021314", "2026021315"], True)
    assert len((await logging_api.get(LOGS))["logs"]) == 2
    done = await logging_api.post(f"{LOGS}cleanup/", {"days_to_keep": 7}, status=200)
    assert done == dry | {"dry_run": False}
    assert (await logging_api.get(LOGS))["logs"] == []
    runs = (await logging_api.get("/proxy/api/retention/runs/"))["runs"]
    assert [(run["state"], run["dry_run"], run["requested_by"]) for run in runs] == [
        ("done", False, "127.0.0.1"),
        ("done", True, "127.0.0.1"),
    ]
    assert [run["report"]["logs"]["files"] for run in runs] == [4, 4]
    document = (await logging_api.client.get("/openapi.json")).json()
    assert document["paths"][f"{LOGS}cleanup/"]["post"]["x-role"] == "admin"
    assert victim.exists()
    assert os.listdir(root / "requests") == ["20260101"]
    for bad in ({"days_to_keep": -1}, {"days_to_keep": "7"}, {"directory": "/etc"}):
        await logging_api.post(f"{LOGS}cleanup/", bad, status=400)
