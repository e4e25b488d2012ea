"""`/proxy/api/retention/`, with the leader's part behind it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from megido_api.settings import Settings
from megido_ingest.retention import Keeper, Places, RetentionMetrics
from megido_shared.clock import SystemClock
from tests.integration.api.harness import Api
from tests.integration.ingest.support import rows
from tests.integration.retention.history import History, moment

RETENTION = "/proxy/api/retention/"


@pytest.fixture
async def keeper(settings: Settings, tmp_path: Path) -> AsyncIterator[CollectorRegistry]:
    """The real keeper of the leader."""
    registry, stop = CollectorRegistry(), asyncio.Event()
    places = Places(tmp_path / "logs", settings.common.data_dir)
    work = Keeper(settings.common.database_url, places, SystemClock(), RetentionMetrics(registry))
    task = asyncio.create_task(work.run(stop))
    yield registry
    stop.set()
    await asyncio.wait_for(task, 15)


@pytest.fixture
def url(settings: Settings) -> str:
    return settings.common.database_url


async def test_the_policy_is_changed_by_field_and_every_change_is_kept(api: Api) -> None:
    found = await api.get(RETENTION)
    assert found["policy"] == {
        "days": 0, "max_bytes": 0, "log_days": 0, "log_max_bytes": 0, "every_minutes": 60,
    }  # fmt: skip
    assert (found["changed_by"], found["last_run"]) == (None, None)
    changed = await api.send("PATCH", RETENTION, {"days": 30, "max_bytes": 20 << 30})
    assert (changed["policy"]["days"], changed["policy"]["max_bytes"]) == (30, 20 << 30)
    assert changed["changed_by"] == "127.0.0.1"
    await api.send("PATCH", RETENTION, {"days": 30})
    await api.send("PATCH", RETENTION, {"days": 7})
    history = (await api.get(f"{RETENTION}history/"))["changes"]
    assert [change["changes"] for change in history] == [
        {"days": {"old": 30, "new": 7}},
        {"days": {"old": 0, "new": 30}, "max_bytes": {"old": 0, "new": 20 << 30}},
    ]


@pytest.mark.parametrize(
    ("document", "field"),
    [({"days": -1}, "days"), ({"days": "7"}, "days"), ({"days": True}, "days"), ({"log_days": 2**40}, "log_days"),
     ({"max_bytes": 2**61}, "max_bytes"), ({"every_minutes": 20_000}, "every_minutes"), ({"weeks": 1}, "weeks")],
)  # fmt: skip
async def test_what_no_policy_can_be_is_refused(api: Api, document: dict[str, Any], field: str) -> None:
    error = (await api.send("PATCH", RETENTION, document, status=400))["error"]
    assert error["details"]["fields"][0]["field"] == field
    assert (await api.get(RETENTION))["changed_by"] is None


async def test_a_dry_run_and_then_the_run(api: Api, url: str, keeper: CollectorRegistry) -> None:
    history = History(url)
    await history.day(6)
    await history.day(0)
    await api.send("PATCH", RETENTION, {"days": 2, "every_minutes": 0})
    assert (await api.get(RETENTION))["days"][0]["day"] == moment(6).date().isoformat()
    dry = await api.post(RETENTION, {"dry_run": True}, status=200)
    assert (dry["state"], dry["dry_run"], dry["requested_by"]) == ("done", True, "127.0.0.1")
    assert dry["report"]["days"][0]["rows"]["flows"] == 4
    assert set(history.days_of()) == {6, 0}
    done = await api.post(RETENTION, {"dry_run": False}, status=200)
    assert done["report"]["days"] == dry["report"]["days"]
    assert set(history.days_of()) == {0}
    listed = await api.get(f"{RETENTION}runs/", limit=1)
    assert [run["id"] for run in listed["runs"]] == [done["id"]]
    assert (await api.get(f"{RETENTION}runs/", cursor=listed["next_cursor"]))["runs"][0]["id"] == dry["id"]
    assert await api.get(f"{RETENTION}runs/{done['id']}/") == done
    assert (await api.get(RETENTION))["last_run"] == done
    assert keeper.get_sample_value("megido_retention_rows_total", {"table": "flows"}) == 4
    await api.get(f"{RETENTION}runs/999/", status=404)
    await api.send("POST", RETENTION, {}, status=400)


async def test_the_schedule_runs_by_itself(api: Api, url: str, keeper: CollectorRegistry) -> None:
    history = History(url)
    await history.day(6)
    await api.send("PATCH", RETENTION, {"days": 2, "every_minutes": 1})
    async with asyncio.timeout(30):
        while (last := (await api.get(RETENTION))["last_run"]) is None or last["state"] != "done":
            await asyncio.sleep(0.05)
    assert last["requested_by"] == "schedule"
    assert history.days_of() == {}


async def test_without_an_ingest_a_run_waits(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megido_api.retention.endpoints.WAIT_S", 0.2)
    answer = await api.client.post(RETENTION, json={"dry_run": True})
    assert (answer.status_code, answer.json()["state"], answer.json()["report"]) == (202, "queued", None)
    assert await api.get(answer.headers["location"]) == answer.json()


async def test_pins(api: Api, url: str, keeper: CollectorRegistry) -> None:
    history = History(url)
    await history.day(6)
    first, second = history.flows[6][:2]
    number = rows(url, "SELECT id FROM flows WHERE flow_id = %s", [first])[0][0]
    pinned = await api.send("PUT", f"{RETENTION}pins/{number}/")
    assert (pinned["id"], pinned["flow_id"], pinned["pinned_by"]) == (number, first.hex, "127.0.0.1")
    await api.send("PUT", f"{RETENTION}pins/{second}/")
    assert await api.send("PUT", f"{RETENTION}pins/{first}/") == pinned
    assert (await api.get(RETENTION))["pinned_flows"] == 2
    page = await api.get(f"{RETENTION}pins/", limit=1)
    rest = await api.get(f"{RETENTION}pins/", limit=1, cursor=page["next_cursor"])
    assert {page["pins"][0]["flow_id"], rest["pins"][0]["flow_id"]} == {first.hex, second.hex}
    assert rest["next_cursor"] is None
    await api.send("DELETE", f"{RETENTION}pins/{second.hex}/", status=204)
    await api.send("PATCH", RETENTION, {"days": 2})
    await api.post(RETENTION, {"dry_run": False}, status=200)
    assert rows(url, "SELECT flow_id FROM flows") == [(first,)]
    for unknown in ("999999", "x", str(second)):
        await api.send("PUT", f"{RETENTION}pins/{unknown}/", status=404)
        await api.send("DELETE", f"{RETENTION}pins/{unknown}/", status=404)
    assert (await api.get(RETENTION))["pinned_flows"] == 1


async def test_every_route_of_logs_and_retention_declares_its_role(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()
    roles = {
        (method, path): operation.get("x-role")
        for path, operations in document["paths"].items()
        if path.startswith((RETENTION, "/proxy/api/logs/"))
        for method, operation in operations.items()
    }
    assert len(roles) == 12
    assert all(role == "viewer" for (method, _), role in roles.items() if method == "get")
    assert all(role in ("operator", "admin") for (method, _), role in roles.items() if method != "get")
