"""Batches from HTTP forwarders."""

import dataclasses
from typing import Any

import msgspec
import psycopg

from megido_api.settings import Settings
from megido_shared import events, ids
from megido_shared.bus.topics import CONFIG, REPLAY_COMMANDS
from megido_shared.testing import a_completed_flow, a_response
from tests.integration.api.harness import Api, Ingest, running

PATH = "/proxy/api/events/"
TOKEN = "0123456789abcdef-token"
TYPE = {"Content-Type": "application/msgpack"}


def entry(event: events.AnyEvent) -> list[Any]:
    return [events.topic_of(event).name, events.key_of(event), events.encode(event)]


async def send(api: Api, batch: Any, **headers: str) -> tuple[int, Any]:
    content = batch if isinstance(batch, bytes) else msgspec.msgpack.encode(batch)
    answer = await api.client.post(PATH, content=content, headers=TYPE | headers)
    return answer.status_code, answer.json()


def waiting(api: Api) -> int:
    with psycopg.connect(api.state.settings.common.database_url) as admin:
        row = admin.execute("SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM flows)").fetchone()
    assert row is not None
    return int(row[0])


async def test_keeps_the_events_identity_and_order(api: Api, ingest: Ingest) -> None:
    flows = [a_completed_flow(node="capture-3", seq=number) for number in (7, 8, 9)]
    batch = [entry(flow) for flow in flows]
    assert await send(api, batch) == (200, {"accepted": 3})
    assert await send(api, batch) == (200, {"accepted": 3})  # a forwarder that did not hear the answer
    await api.stored("example", 3)
    with psycopg.connect(api.state.settings.common.database_url) as admin:
        rows = admin.execute("SELECT node, epoch, seq, event_id FROM flows ORDER BY id").fetchall()
    assert rows == [("capture-3", ids.to_uuid(f.epoch), f.seq, ids.to_uuid(f.event_id)) for f in flows]
    assert (await api.get("/proxy/api/stats/"))["total_requests"] == 3


async def test_an_empty_batch(api: Api) -> None:
    assert await send(api, []) == (200, {"accepted": 0})


async def test_one_bad_record_refuses_the_batch(api: Api) -> None:
    good = entry(a_completed_flow())
    topic, key, value = good
    command = events.ReplayFlows(event_id=ids.new_id(), node="n", epoch=ids.new_id(), time_us=1, job_id=ids.new_id())
    posted = entry(a_completed_flow(posted_id=5))
    cases: list[tuple[Any, str]] = [
        ([topic, key, b"not msgpack"], "invalid_event"),
        ([topic, key, msgspec.msgpack.encode({"type": "Unknown"})], "invalid_event"),
        ([topic, key, value[:-3]], "invalid_event"),
        (["megido.errors", key, value], "invalid_event"),
        ([topic, b"another key", value], "invalid_event"),
        (["no.such.topic", key, value], "invalid_event"),
        ([CONFIG.name, b"global", b"{}"], "invalid_event"),
        ([REPLAY_COMMANDS.name, command.job_id, events.encode(command)], "invalid_event"),
        (posted, "invalid_event"),
        ([topic, key], "invalid_batch"),
        (["topic", 5, value], "invalid_batch"),
        ("text", "invalid_batch"),
    ]
    for bad, code in cases:
        status, found = await send(api, [good, bad])
        assert (status, found["error"]["code"]) == (400, code), bad
        if code == "invalid_event":
            assert found["error"]["details"] == {"index": 1}
    for raw in (b"", b"\xc1", b"{}", msgspec.msgpack.encode({"a": 1})):
        status, found = await send(api, raw)
        assert (status, found["error"]["code"]) == (400, "invalid_batch")
    assert waiting(api) == 0


async def test_other_media_types_are_refused(api: Api) -> None:
    answer = await api.client.post(PATH, json=[])
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_the_token_is_asked_for_when_one_is_set(settings: Settings) -> None:
    async with running(dataclasses.replace(settings, token=TOKEN)) as api:
        batch = [entry(a_completed_flow())]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            status, found = await send(api, batch, **headers)
            assert (status, found["error"]["code"]) == (401, "unauthorized")
        assert waiting(api) == 0
        assert await send(api, batch, Authorization=f"Bearer {TOKEN}") == (200, {"accepted": 1})
        assert (await api.get("/proxy/api/stats/"))["total_requests"] == 0  # reads on loopback need none


async def test_the_size_is_bounded(settings: Settings) -> None:
    async with running(dataclasses.replace(settings, max_body_bytes=10_000)) as api:
        for content in (b"x" * 20_000, pieces()):
            answer = await api.client.post(PATH, content=content, headers=TYPE)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


async def test_a_record_that_no_bus_takes_is_refused(api: Api) -> None:
    body = events.Body(data=bytes(5_000_000), size=5_000_000)
    batch = [entry(a_completed_flow()), entry(a_completed_flow(response=a_response(body=body)))]
    status, found = await send(api, batch)
    assert (status, found["error"]["code"]) == (413, "too_large")
    assert waiting(api) == 0


async def pieces():  # type: ignore[no-untyped-def]
    """A body that does not declare its length."""
    for _ in range(20):
        yield b"x" * 1000
