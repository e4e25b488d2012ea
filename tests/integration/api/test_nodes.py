"""Nodes: what they say of themselves, and whether they apply what they should."""

from dataclasses import replace
from typing import Any

from megido_api.settings import Settings
from megido_shared import ids
from megido_shared.events import NodeStatus
from megido_shared.testing.builders import EPOCH
from tests.integration.api.harness import Api, Ingest, eventually, running

PATH = "/proxy/api/nodes/"


def a_status(api: Api, **more: Any) -> NodeStatus:
    fields: dict[str, Any] = {
        "event_id": ids.new_id(),
        "node": "capture-0",
        "epoch": EPOCH,
        "time_us": api.state.clock.time_us(),
        "source_app": "scanner",
        "state": "running",
        "listen": "127.0.0.1:8080",
    }
    return NodeStatus(**(fields | more))


async def nodes(api: Api, count: int, **params: Any) -> list[dict[str, Any]]:
    async def enough() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await api.get(PATH, **params))["nodes"]
        return found if len(found) == count else []

    return await eventually(enough, f"{count} nodes")


async def test_what_nodes_say(api: Api, ingest: Ingest) -> None:
    below = (await api.send("PATCH", "/proxy/api/config/", {"max_body_size": 4}))["version"]
    expected = (await api.send("PATCH", "/proxy/api/config/app:scanner/", {"max_body_size": 5}))["version"]
    told: dict[str, Any] = {"config_version": expected - 1, "config_stale": True, "config_error": "a bad list"}
    pinned = {"max_body_size": "7", "auth_token": "set"}
    await api.publish(
        a_status(api, **told, pinned=pinned, counters={"rule_errors:3": 2, "rule_skipped:3": 1}, captured=9),
        a_status(api, node="replayer-0", service="replayer", source_app=""),
        a_status(api, node="capture-1", source_app="browser", state="stopping", config_version=1),
        a_status(api, node="capture-2", time_us=api.state.clock.time_us() - 60_000_000),
    )
    found = {node["node"]: node for node in await nodes(api, 4)}
    scanner = found["capture-0"]
    assert {name: scanner[name] for name in told} == told
    assert (scanner["config_expected"], scanner["pinned"], scanner["captured"]) == (expected, pinned, 9)
    assert (scanner["source_app"], scanner["listen"], scanner["alive"]) == ("scanner", "127.0.0.1:8080", True)
    assert found["replayer-0"]["config_expected"] is None
    assert found["capture-1"]["config_expected"] == below  # the global one's: its application has none
    assert (found["capture-1"]["alive"], found["capture-2"]["alive"]) == (False, False)
    assert {node["node"] for node in await nodes(api, 2, alive=True)} == {"replayer-0", "capture-0"}
    assert [node["node"] for node in await nodes(api, 1, service="replayer")] == ["replayer-0"]

    shown = await api.get("/proxy/api/config/")
    assert shown["overridden"] == {
        "max_body_size": [{"node": "capture-0", "value": "7"}],
        "auth_token": [{"node": "capture-0", "value": "set"}],
    }


async def test_troubles_of_rules_are_shown_on_the_rule(api: Api, ingest: Ingest) -> None:
    rule = {
        "name": "r",
        "target_url_pattern": ".",
        "injection_type": "header",
        "injection_point": "X",
        "payload_content": "1",
    }
    number = (await api.post("/interceptor/api/payload-rules/", rule))["id"]
    counters = {f"rule_errors:{number}": 2, f"rule_skipped:{number}": 1, "rule_hits:1": 4}
    await api.publish(a_status(api, counters=counters), a_status(api, node="capture-1", counters=counters))
    await nodes(api, 2)
    shown = await api.get(f"/interceptor/api/payload-rules/{number}/")
    assert (shown["errors"], shown["skipped"]) == (4, 2)
    assert (await api.get("/interceptor/api/payload-rules/"))[0] == shown


async def test_hashes_of_credentials_ask_for_the_token(settings: Settings) -> None:
    async with running(replace(settings, token="t" * 16)) as api:
        await api.get("/proxy/api/config/")
        await api.get("/proxy/api/config/active/", status=401)
        answer = await api.client.get("/proxy/api/config/active/", headers={"Authorization": "Bearer " + "t" * 16})
        assert answer.status_code == 200
        await api.client.patch(
            "/proxy/api/config/", json={"max_body_size": 1}, headers={"Authorization": "Bearer " + "t" * 16}
        )
        history = await api.get("/proxy/api/config/history/")
        assert history["changes"][0]["changed_by"] == "token, 127.0.0.1"
