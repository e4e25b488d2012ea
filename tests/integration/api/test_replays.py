"""Replays through the API: the rows and the command that it makes, and what it answers meanwhile and at last."""

import asyncio
import dataclasses
import uuid
from typing import Any

import psycopg
import pytest

from megido_api.settings import Settings
from megido_shared import events, ids
from megido_shared.bus.topics import REPLAY_COMMANDS
from megido_shared.replay import ReplayOptions, from_json
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.api.harness import Api, Ingest, eventually, on_topic, running

TOKEN = "0123456789abcdef-token"


@pytest.fixture
async def original(api: Api, ingest: Ingest) -> dict[str, Any]:
    request = a_request(method=b"PUT", body=events.Body(data=b"payload", size=7))
    await api.publish(a_completed_flow(request=request))
    (listed,) = await api.stored("users")
    return await api.get(f"/proxy/api/requests/{listed['id']}/")  # type: ignore[no-any-return]


def database(api: Api) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(api.state.settings.common.database_url, autocommit=True)


def finish(api: Api, state: str, flow: events.AnyFlow | None = None, error: str | None = None) -> None:
    """What the replayer writes at the end of an item."""
    flow_id = None if flow is None else uuid.UUID(bytes=flow.flow_id)
    with database(api) as admin:
        admin.execute("UPDATE replay_items SET state = %s, result_flow_id = %s, error = %s", [state, flow_id, error])


async def queued(api: Api) -> uuid.UUID:
    """The id of the one job, once it is there."""

    async def found() -> uuid.UUID | None:
        def ask() -> Any:
            with database(api) as admin:
                return admin.execute("SELECT job_id FROM replay_jobs").fetchone()

        row = await asyncio.to_thread(ask)
        return row[0] if row else None

    job = await eventually(found, "the job")
    assert job is not None
    return job


def a_replay(original: dict[str, Any], job: uuid.UUID, **changes: Any) -> events.FlowCompleted:
    return a_completed_flow(
        **(
            {
                "is_replay": True,
                "original_flow_id": uuid.UUID(original["flow_id"]).bytes,
                "replay_job_id": job.bytes,
                "replay_position": 0,
                "request": a_request(host="127.0.0.1", port=3000, scheme="http", method=b"PUT"),
                "response": a_response(status=418, body=b"teapot"),
            }
            | changes
        )
    )


async def test_queues_all_or_nothing_and_answers_202(api: Api, original: dict[str, Any]) -> None:
    options = {"target_url": "http://localhost:3000/test", "verify_tls": False, "timeout": 7, "wait": False}
    answer = await api.client.post(f"/proxy/api/requests/{original['id']}/replay/", json=options)
    accepted = answer.json()
    assert (answer.status_code, accepted["state"]) == (202, "queued")
    assert answer.headers["location"] == accepted["job_url"] == f"/proxy/api/replays/{accepted['job_id']}/"
    (command,) = await on_topic(api.bus, REPLAY_COMMANDS, 1)
    event = events.decode(command.value)
    assert isinstance(event, events.ReplayFlows)
    assert str(uuid.UUID(bytes=event.job_id)) == accepted["job_id"]

    job = await api.get(accepted["job_url"])
    assert (job["state"], job["total_items"], job["items_by_state"]) == ("queued", 1, {"queued": 1})
    assert from_json(job["options"]) == ReplayOptions(
        target_url="http://localhost:3000/test",
        verify_tls=False,
        timeout_s=7,
        allow_loopback=True,
        protect=("localhost:8000",),  # where the request came in
    )
    (item,) = job["items"]
    assert (item["position"], item["state"], item["attempt"]) == (0, "queued", 0)
    assert (item["original_request_id"], item["original_flow_id"]) == (original["id"], original["flow_id"])
    assert (item["replayed_request_id"], item["result_flow_id"]) == (None, None)


async def test_waits_for_the_result_and_its_flow(api: Api, original: dict[str, Any]) -> None:
    waiting = asyncio.create_task(api.client.post(f"/proxy/api/requests/{original['flow_id']}/replay/"))
    job = await queued(api)
    replay = a_replay(original, job)
    finish(api, "succeeded", replay)
    # The item is final, but its flow is not stored yet: the answer must not come.
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done
    await api.publish(replay)
    answer = (await waiting).json()
    assert (await waiting).status_code == 200
    (listed,) = await api.stored("127.0.0.1:3000")
    assert answer == {
        "success": True,
        "request": {
            "url": "http://127.0.0.1:3000/users?page=1",
            "original_url": "https://api.example.com/users?page=1",
            "method": "PUT",
            "headers": {"Host": "api.example.com", "User-Agent": "test/1.0"},
            "raw_headers": [["Host", "api.example.com"], ["User-Agent", "test/1.0"]],
            "body": "",
        },
        "response": {
            "status_code": 418,
            "headers": {"Content-Type": "application/json"},
            "raw_headers": [["Content-Type", "application/json"]],
            "body": "teapot",
            "response_time": 1.2,
            "success": True,
        },
        "timestamp": listed["timestamp"],
        "error_message": None,
        "replayed_request_id": listed["id"],
        "deviations": [],
        "job_id": str(job),
        "diff_url": None,
    }
    detail = await api.get(f"/proxy/api/requests/{listed['id']}/")
    assert (detail["is_replay"], detail["original_request_id"], detail["replay_job_id"]) == (
        True,
        original["id"],
        str(job),
    )
    item = (await api.get(f"/proxy/api/replays/{job}/"))["items"][0]
    assert item["replayed_request_id"] == listed["id"]


async def test_a_failed_send_is_an_answer_too(api: Api, original: dict[str, Any]) -> None:
    waiting = asyncio.create_task(api.client.post(f"/proxy/api/requests/{original['id']}/replay/", json={}))
    job = await queued(api)
    sent = a_replay(original, job)
    failure = events.Failure(events.ErrorType.CONNECTION_RESET, "refused")
    failed = events.FlowFailed(
        event_id=ids.new_id(),
        node=sent.node,
        epoch=sent.epoch,
        seq=9,
        time_us=sent.time_us,
        flow_id=sent.flow_id,
        request=sent.request,
        is_replay=True,
        original_flow_id=sent.original_flow_id,
        failure=failure,
    )
    await api.publish(failed)
    finish(api, "failed", failed, "connection refused")
    answer = (await waiting).json()
    assert (answer["success"], answer["error_message"]) == (False, "connection refused")
    assert answer["response"] == {"success": False, "error": "connection refused"}
    assert answer["request"]["url"].startswith("http://127.0.0.1:3000/")
    assert answer["replayed_request_id"] == (await api.stored("127.0.0.1:3000"))[0]["id"]


@pytest.mark.parametrize("state", ["skipped", "unknown", "cancelled"])
async def test_nothing_was_sent_or_nobody_knows(api: Api, original: dict[str, Any], state: str) -> None:
    waiting = asyncio.create_task(api.client.post(f"/proxy/api/requests/{original['id']}/replay/"))
    await queued(api)
    finish(api, state, error="the target is refused" if state == "skipped" else None)
    answer = (await waiting).json()
    expected = "the target is refused" if state == "skipped" else f"the replay is {state}"
    assert (answer["success"], answer["error_message"], answer["replayed_request_id"]) == (False, expected, None)
    assert answer["request"]["url"] == original["url"]


async def test_too_slow_becomes_202(api: Api, original: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megido_api.replays.waiting._GRACE_S", 0.1)
    answer = await api.client.post(f"/proxy/api/requests/{original['id']}/replay/", json={"timeout": 0.2})
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    assert (await api.get(answer.json()["job_url"]))["total_items"] == 1


async def test_bad_targets_and_unknown_ids_leave_nothing(api: Api, original: dict[str, Any]) -> None:
    path = f"/proxy/api/requests/{original['id']}/replay/"
    for target in (
        "localhost:3000",
        "ftp://x/",
        "http://",
        "http:///x",
        "http://h:99999/",
        "http://a b/",
        "http://h/\0",
        "/x",
    ):
        found = await api.post(path, {"target_url": target}, status=400)
        assert [entry["field"] for entry in found["error"]["details"]["fields"]] == ["target_url"], target
    for change in (
        {"timeout": 0},
        {"timeout": "NaN"},
        {"timeout": 1e9},
        {"verify_tls": "perhaps"},
        {"wait": 7},
        {"target": "http://h/"},
    ):
        found = await api.post(path, change, status=400)
        assert [entry["field"] for entry in found["error"]["details"]["fields"]] == list(change)
    for unknown in ("999999", "abc", str(uuid.uuid4()), "99999999999999999999999", "-1", "1.0", "%00"):
        found = await api.post(f"/proxy/api/requests/{unknown}/replay/", {}, status=404)
        assert found["error"]["code"] == "not_found"
        assert (await api.get(f"/proxy/api/replays/{unknown}/", status=404))["error"]["code"] == "not_found"
    with database(api) as admin:
        for table in ("replay_jobs", "replay_items", "outbox"):
            assert admin.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


async def test_a_posted_request_that_is_not_stored_yet(api: Api) -> None:
    request = {"url": "http://old.example/", "method": "GET", "host": "old.example", "port": 80}
    number = (await api.post("/proxy/api/requests/", request))["id"]
    answer = await api.client.post(f"/proxy/api/requests/{number}/replay/")
    assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")


async def test_loopback_targets_only_where_the_api_is_on_loopback(settings: Settings, ingest: Ingest) -> None:
    public = dataclasses.replace(settings, host="0.0.0.0", token=TOKEN)
    async with running(public) as api:
        api.client.headers["Authorization"] = f"Bearer {TOKEN}"
        await api.publish(a_completed_flow())
        (listed,) = await api.stored("users")
        accepted = await api.post(f"/proxy/api/requests/{listed['id']}/replay/", {"wait": False}, status=202)
        job = await api.get(accepted["job_url"])
    assert from_json(job["options"]).allow_loopback is False
