"""Every filter, and the two ways to page."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from megido_shared import events, ids
from megido_shared.clock import to_us
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.api.harness import Api, Ingest, eventually

PATH = "/proxy/api/requests/"
NOW = datetime(2026, 2, 13, 12, tzinfo=UTC)


def flow(number: int, **changes: Any) -> events.FlowCompleted:
    agent = [(b"User-Agent", f"agent/{number}".encode())]
    request = {"target": f"/item/{number}".encode(), "headers": events.pack_headers(agent)}
    request |= changes.pop("request", {})
    moment = to_us(NOW + timedelta(minutes=number))
    return a_completed_flow(time_us=moment, seq=number + 1, request=a_request(**request), **changes)


async def urls(api: Api, **params: Any) -> list[str]:
    return [one["url"].partition(".com")[2] for one in (await api.get(PATH, **params))["requests"]]


@pytest.fixture
async def stored(api: Api, ingest: Ingest) -> Api:
    await api.publish(
        flow(0),
        flow(1, request={"method": b"POST", "scheme": "http", "port": 80}),
        flow(2, request={"method": b"PROPFIND"}, client=events.Peer(ip="10.1.2.3")),
        flow(3, request={"host": "other.example.com", "target": b"/100%_done\\now"}),
        flow(4, is_replay=True, original_flow_id=ids.new_id(), response=a_response(status=404)),
    )
    await api.stored("example", 5)
    return api


async def test_newest_first_with_the_documents_fields(stored: Api) -> None:
    found = await stored.get(PATH)
    assert (found["total"], found["limit"], found["offset"], found["next_cursor"]) == (5, 100, 0, None)
    assert found["total_is_exact"] is True
    assert [one["url"] for one in found["requests"]][::2] == [
        "https://api.example.com/item/4",
        "https://api.example.com/item/2",
        "https://api.example.com/item/0",
    ]
    assert set(found["requests"][0]) >= {
        *("id", "method", "url", "host", "protocol", "source_ip", "timestamp", "request_size", "is_replay"),
        *("status_code", "response_time"),
    }
    assert (found["requests"][0]["status_code"], found["requests"][0]["response_time"]) == (404, 1.2)


FILTERS: list[tuple[dict[str, str], list[str]]] = [
    ({"method": "post"}, ["/item/1"]),
    ({"method": "POST"}, ["/item/1"]),
    ({"method": "PropFind"}, ["/item/2"]),
    ({"method": "DELETE"}, []),
    ({"protocol": "http"}, ["/item/1"]),
    ({"protocol": "HTTP", "method": "GET"}, []),
    ({"protocol": "Https", "source_ip": "10.1.2.3"}, ["/item/2"]),
    ({"source_ip": "10.1.2"}, []),
    ({"is_replay": "true"}, ["/item/4"]),
    ({"is_replay": "True"}, ["/item/4"]),
    ({"is_replay": "false", "method": "post"}, ["/item/1"]),
    ({"is_replay": "", "protocol": "", "method": "post"}, ["/item/1"]),
    ({"search": "ITEM/2"}, ["/item/2"]),
    ({"search": "Other.EXAMPLE"}, ["/100%_done\\now"]),
    ({"search": "AGENT/0"}, ["/item/0"]),
    ({"search": "0%_d"}, ["/100%_done\\now"]),
    ({"search": "e\\n"}, ["/100%_done\\now"]),
    ({"search": "item_"}, []),
    ({"search": "%"}, ["/100%_done\\now"]),
    ({"after": "2026-02-13T12:03:00+00:00"}, ["/item/4", "/100%_done\\now"]),
    ({"before": "2026-02-13T12:01:00Z"}, ["/item/0"]),
    ({"before": str(NOW.timestamp() + 61), "after": str(NOW.timestamp() + 1)}, ["/item/1"]),
    ({"limit": "2", "offset": "1"}, ["/100%_done\\now", "/item/2"]),
    ({"method": "", "search": "", "source_ip": "", "limit": "1"}, ["/item/4"]),
]


async def test_filters(stored: Api) -> None:
    for params, expected in FILTERS:
        assert (params, await urls(stored, **params)) == (params, expected)


async def test_totals_count_what_the_filters_select(stored: Api) -> None:
    for params, total in (
        ({"limit": 1}, 5),
        ({"limit": 1, "method": "GET"}, 3),
        ({"limit": 2, "offset": 4}, 5),
        ({"offset": 50}, 5),
        ({"search": "nothing of the kind"}, 0),
    ):
        found = await stored.get(PATH, **params)
        assert (found["total"], found["total_is_exact"]) == (total, True), params


async def test_bad_parameters_name_their_field(api: Api) -> None:
    times = {"before": ["-1", "1e3"], "after": ["-1", "1e3"]}
    for field in ("limit", "offset", "is_replay", "cursor", "before", "after"):
        for value in ("x", "-1", "1e3", "9" * 30, "0x10", "NaN", "\0"):
            if value in times.get(field, []):
                continue
            found = await api.get(PATH, status=400, **{field: value})
            assert found["error"]["code"] == "invalid"
            assert [entry["field"] for entry in found["error"]["details"]["fields"]] == [field]


async def test_hostile_texts_select_nothing_or_are_refused(api: Api) -> None:
    for field in ("method", "protocol", "source_ip", "search"):
        for text in ("'; DROP TABLE flows; --", "%' OR 1=1 --", "\\", "é\u2028", "x" * 4000):
            assert (await api.get(PATH, **{field: text}))["requests"] == []
        refused = await api.get(PATH, status=400, **{field: "a\0b"})
        assert refused["error"]["details"]["fields"][0]["field"] == field
        raw = await api.client.get(f"{PATH}?{field}=%ED%A0%80%FF")
        assert (raw.status_code, raw.json()["requests"]) == (200, [])


async def test_limits(api: Api) -> None:
    assert (await api.get(PATH, limit=10_000))["limit"] == 10_000
    for limit in (0, 10_001):
        await api.get(PATH, status=400, limit=limit)


async def test_cursor_and_offset_agree_while_new_flows_arrive(api: Api, ingest: Ingest) -> None:
    await api.publish(*(flow(number) for number in range(60)))
    await api.stored("item", 60)
    by_offset: list[str] = []
    while page := await urls(api, limit=7, offset=len(by_offset)):
        by_offset += page
    assert len(by_offset) == len(set(by_offset)) == 60

    by_cursor: list[str] = []
    params: dict[str, Any] = {"limit": 7}
    added = 0
    while True:
        found = await api.get(PATH, **params)
        by_cursor += [one["url"].partition(".com")[2] for one in found["requests"]]
        assert found["total"] == 60 + added
        if found["next_cursor"] is None:
            break
        params["cursor"] = found["next_cursor"]
        if added < 2:
            await api.publish(flow(100 + added))
            added += 1
            await api.stored("item", 60 + added)
    assert by_cursor == by_offset

    newest = (await api.get(PATH, limit=1))["requests"][0]
    await api.publish(flow(200))
    await api.stored("item", 63)
    assert await urls(api, after=newest["flow_id"]) == ["/item/200"]
    assert (await urls(api, before=newest["flow_id"]))[0] == "/item/100"


async def test_a_total_past_the_cap_is_an_estimate_and_says_so(
    api: Api, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megido_api.paging.COUNT_CAP", 3)
    await api.publish(*(flow(number) for number in range(8)))
    await api.stored("item", 8)
    everything = await api.get(PATH, limit=2)
    assert (everything["total"], everything["total_is_exact"]) == (8, False)
    filtered = await api.get(PATH, limit=2, method="GET")
    assert (filtered["total"], filtered["total_is_exact"]) == (3, False)


async def test_a_list_reads_neither_bodies_nor_headers(api: Api, ingest: Ingest) -> None:
    """Columns that a list must not load are made unreadable: the list does not notice."""
    import psycopg

    await api.publish(flow(1))
    await api.stored("item")
    with psycopg.connect(api.state.settings.common.database_url, autocommit=True) as admin:
        admin.execute("DROP TABLE bodies CASCADE")
        for column in ("request_headers", "response_headers", "detail"):
            admin.execute(f"UPDATE flows SET {column} = '\\x99'")
    assert await urls(api) == ["/item/1"]


async def test_while_it_is_open(api: Api, ingest: Ingest) -> None:
    done = flow(1)
    started = events.FlowStarted(
        event_id=ids.new_id(),
        node=done.node,
        epoch=done.epoch,
        time_us=done.time_us,
        flow_id=done.flow_id,
        request=done.request,
    )
    await api.publish(started)

    async def listed() -> Any:
        return (await api.get(PATH))["requests"]

    (open_flow,) = await eventually(listed, "the open flow")
    assert (open_flow["state"], open_flow["status_code"], open_flow["response_time"]) == ("started", None, None)
    await api.publish(done)
    (ended,) = await api.stored("item")
    assert (ended["id"], ended["state"], ended["status_code"]) == (open_flow["id"], "completed", 200)


async def test_a_broken_response_says_why(api: Api, ingest: Ingest) -> None:
    whole = flow(7)
    failure = events.Failure(events.ErrorType.CONNECTION_RESET, "reset within the body")
    broken = events.FlowFailed(
        event_id=ids.new_id(), node="n", epoch=ids.new_id(), seq=1, time_us=whole.time_us, flow_id=whole.flow_id,
        request=whole.request, response=whole.response, failure=failure,
    )  # fmt: skip
    await api.publish(broken)
    (listed,) = await api.stored("item/7")
    found = await api.get(f"{PATH}{listed['id']}/")
    assert found["response"]["error_message"] == found["error"]["error_message"] == "reset within the body"
