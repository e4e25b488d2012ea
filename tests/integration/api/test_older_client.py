"""A capture tool written from the founding document alone, and what it reads back."""

import base64
from typing import Any

import pytest

from megido_shared import events
from megido_shared.bus.topics import FLOWS
from tests.integration.api.harness import Api, Ingest, eventually, on_topic, running

REQUEST = {
    "url": "https://api.example.com/users?page=1",
    "method": "POST",
    "host": "api.example.com",
    "port": 443,
    "headers": '{"Host": "api.example.com", "User-Agent": "Mozilla/5.0", "X-Empty": ""}',
    "body": '{"name": "Änne"}',
    "source_ip": "192.168.1.100",
    "protocol": "HTTPS",
    "request_size": 17,
    "user_agent": "Mozilla/5.0",
    "source_app": "scanner",
    "timestamp": 1770993052.123456,
}
RESPONSE = {
    "status_code": 201,
    "headers": '{"Content-Type": "application/json", "Set-Cookie": "a=b"}',
    "body": '{"id": 7}',
    "response_time": 123.45,
    "response_size": 9,
    "cached": False,
    "error_message": "",
}


async def test_request_and_response(api: Api, ingest: Ingest) -> None:
    created = await api.post("/proxy/api/requests/", REQUEST)
    number = created["id"]
    assert created == {"id": number}
    answered = await api.post("/proxy/api/responses/", {"request": number, **RESPONSE})
    assert isinstance(answered["id"], int)
    (listed,) = await api.stored("api.example.com/users")
    expected = {
        "id": number,
        "method": "POST",
        "url": REQUEST["url"],
        "host": "api.example.com",
        "protocol": "HTTPS",
        "source_ip": "192.168.1.100",
        "timestamp": "2026-02-13T14:30:52.123456+00:00",
        "request_size": 17,
        "is_replay": False,
        "status_code": 201,
        "response_time": 123.45,
        "source_app": "scanner",
    }
    assert {name: listed[name] for name in expected} == expected
    found = await api.get(f"/proxy/api/requests/{number}/")
    assert (found["headers"], found["body"], found["port"]) == (
        {"Host": "api.example.com", "User-Agent": "Mozilla/5.0", "X-Empty": ""},
        REQUEST["body"],
        443,
    )
    assert (found["user_agent"], found["original_request_id"]) == ("Mozilla/5.0", None)
    answer = found["response"]
    assert {name: answer[name] for name in ("status_code", "body", "response_time", "response_size", "cached")} == {
        "status_code": 201,
        "body": '{"id": 7}',
        "response_time": 123.45,
        "response_size": 9,
        "cached": False,
    }
    assert answer["headers"] == {"Content-Type": "application/json", "Set-Cookie": "a=b"}
    assert await api.get(f"/proxy/api/requests/{found['flow_id']}/") == found
    assert ingest.letters == 0


async def test_readable_before_ingest_has_stored_it(api: Api) -> None:
    number = (await api.post("/proxy/api/requests/", REQUEST))["id"]
    found = await api.get(f"/proxy/api/requests/{number}/")
    assert (found["id"], found["url"], found["body"], found["state"]) == (
        number,
        REQUEST["url"],
        REQUEST["body"],
        "started",
    )
    assert "response" not in found
    body = await api.client.get(f"/proxy/api/requests/{number}/body")
    assert body.content == REQUEST["body"].encode()  # type: ignore[attr-defined]
    assert (await api.get("/proxy/api/requests/"))["total"] == 0


async def test_the_same_shape_before_and_after_ingest(api: Api, ingest: Ingest) -> None:
    await ingest.stop()
    number = (await api.post("/proxy/api/requests/", REQUEST))["id"]
    before = await api.get(f"/proxy/api/requests/{number}/")
    await ingest.start()

    async def stored() -> bool:
        return bool((await api.get("/proxy/api/requests/"))["total"])

    await eventually(stored, "the posted request")
    after = await api.get(f"/proxy/api/requests/{number}/")
    assert before.pop("sha256") is None
    assert after.pop("sha256") is not None
    assert before == after


async def test_only_the_required_fields(api: Api, ingest: Ingest) -> None:
    minimal = {"url": "http://old.example/", "method": "GET", "host": "old.example", "port": 80}
    number = (await api.post("/proxy/api/requests/", minimal))["id"]
    await api.post("/proxy/api/responses/", {"request": number, "status_code": 204})
    (listed,) = await api.stored("old.example")
    assert (listed["id"], listed["protocol"], listed["status_code"]) == (number, "HTTP", 204)
    assert (listed["response_time"], listed["source_ip"], listed["request_size"]) == (None, "", 0)


async def test_headers_as_an_object_and_bodies_in_base64(api: Api, ingest: Ingest) -> None:
    data = bytes(range(256))
    posted: dict[str, Any] = REQUEST | {
        "headers": {"A": "b", "C": 3},
        "body": base64.b64encode(data).decode(),
        "body_encoding": "base64",
        "request_size": None,
    }
    number = (await api.post("/proxy/api/requests/", posted))["id"]
    await api.post("/proxy/api/responses/", {"request": number, "status_code": 200, "body": "\0"})
    await api.stored("users")
    found = await api.get(f"/proxy/api/requests/{number}/")
    assert found["headers"] == {"A": "b", "C": "3", "User-Agent": "Mozilla/5.0"}
    assert (found["body_encoding"], found["body_size"]) == ("base64", 256)
    assert base64.b64decode(found["body_base64"]) == data
    assert (await api.client.get(f"/proxy/api/requests/{number}/body")).content == data
    assert found["response"]["body"] == "\0"


@pytest.mark.parametrize("size", [200_000, 1_500_000])
async def test_large_bodies_travel_in_pieces(api: Api, ingest: Ingest, size: int) -> None:
    text = "".join(chr(97 + number % 26) for number in range(size))
    number = (await api.post("/proxy/api/requests/", REQUEST | {"body": text, "request_size": size}))["id"]
    answer = {"request": number, "status_code": 200, "body": text[::-1]}
    await api.post("/proxy/api/responses/", answer)
    await api.stored("users")

    async def whole() -> bool:
        found = await api.get(f"/proxy/api/requests/{number}/")
        return not found["truncated"] and not found["response"]["truncated"]

    await eventually(whole, "both bodies")
    assert (await api.client.get(f"/proxy/api/requests/{number}/body")).text == text
    assert (await api.client.get(f"/proxy/api/requests/{number}/response/body")).text == text[::-1]
    assert all(len(record.value) < 900_000 for record in await on_topic(api.bus, FLOWS, 2))


async def test_a_cut_body_keeps_its_true_size(api: Api, ingest: Ingest) -> None:
    number = (await api.post("/proxy/api/requests/", REQUEST | {"body": "first part", "request_size": 5000}))["id"]
    await api.post("/proxy/api/responses/", {"request": number, "status_code": 200, "response_size": 70})
    await api.stored("users")
    found = await api.get(f"/proxy/api/requests/{number}/")
    assert (found["body"], found["request_size"], found["truncated"]) == ("first part", 5000, True)
    assert (found["response"]["body"], found["response"]["response_size"]) == ("", 70)
    answer = await api.client.get(f"/proxy/api/requests/{number}/response/body")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "body_not_stored")


async def test_a_response_twice_changes_nothing(api: Api, ingest: Ingest) -> None:
    number = (await api.post("/proxy/api/requests/", REQUEST))["id"]
    first = await api.post("/proxy/api/responses/", {"request": number, "status_code": 200})
    assert await api.post("/proxy/api/responses/", {"request": number, "status_code": 500}) == first
    (listed,) = await api.stored("users")
    assert listed["status_code"] == 200
    assert (await api.get("/proxy/api/stats/"))["total_requests"] == 1


async def test_a_response_to_nothing(api: Api, ingest: Ingest) -> None:
    from megido_shared.testing import a_completed_flow

    unknown = await api.post("/proxy/api/responses/", {"request": 123456, "status_code": 200}, status=404)
    assert unknown["error"]["code"] == "not_found"
    await api.publish(a_completed_flow())
    (captured,) = await api.stored("example")
    refused = await api.post("/proxy/api/responses/", {"request": captured["id"], "status_code": 200}, status=409)
    assert refused["error"]["code"] == "not_posted"


async def test_websocket_messages(api: Api, ingest: Ingest) -> None:
    base = {"connection_id": "ws_12345", "url": "wss://e.example/ws", "source_ip": "10.0.0.9"}
    texts = [
        ("SEND", "TEXT", "hello", "hello", 5),
        ("RECEIVE", "BINARY", "00ff10", "00ff10", 3),
        ("RECEIVE", "BINARY", "no hex", b"no hex".hex(), 6),
        ("send", "ping", "", "", 0),
        ("SEND", "TEXT", "x" * 300, "x" * 200 + "...", 300),
        ("SEND", "TEXT", "\ud83d\ude00 \ud800", "\U0001f600 \ufffd", 8),
    ]
    ids = []
    for direction, kind, payload, _, _ in texts:
        message = base | {"direction": direction, "message_type": kind, "payload": payload, "timestamp": 1770993060}
        ids.append((await api.post("/proxy/api/websocket-messages/", message))["id"])

    async def stored() -> list[dict[str, Any]]:
        found = await api.get("/proxy/api/websocket-messages/list/", connection_id="ws_12345")
        return found["messages"] if found["total"] == len(texts) else []  # type: ignore[no-any-return]

    found = await eventually(stored, "the messages")
    assert [message["id"] for message in found] == ids[::-1]
    shown = [(m["payload"], m["payload_size"]) for m in found[::-1]]
    assert shown[:5] == [(payload, size) for _, _, _, payload, size in texts[:5]]
    assert shown[5][0].startswith("\U0001f600 ")
    first = found[-1]
    assert (first["direction"], first["message_type"], first["url"]) == ("SEND", "TEXT", "wss://e.example/ws")
    assert (first["source_ip"], first["timestamp"]) == ("10.0.0.9", "2026-02-13T14:31:00+00:00")
    assert {message["flow_id"] for message in found} == {first["flow_id"]}
    again = base | {"direction": "SEND", "message_type": "CLOSE", "payload": ""}
    async with running(api.state.settings, api.bus) as restarted:
        await restarted.post("/proxy/api/websocket-messages/", again)

    async def closed() -> list[dict[str, Any]]:
        listed = await api.get("/proxy/api/websocket-messages/list/", message_type="CLOSE")
        return listed["messages"]  # type: ignore[no-any-return]

    assert (await eventually(closed, "the close"))[0]["flow_id"] == first["flow_id"]
    only = await api.get("/proxy/api/websocket-messages/list/", direction="receive", message_type="binary", limit=1)
    assert (len(only["messages"]), only["total"], only["limit"]) == (1, 2, 1)
    rest = await api.get("/proxy/api/websocket-messages/list/", direction="RECEIVE", cursor=only["next_cursor"])
    assert [message["id"] for message in rest["messages"]] == [ids[1]]
    assert ingest.letters == 0


async def test_errors(api: Api, ingest: Ingest) -> None:
    full = {
        "error_type": "TIMEOUT",
        "error_message": "timed out\0",
        "stack_trace": "Traceback …",
        "url": "http://slow.example/",
        "source_ip": "10.0.0.8",
        "timestamp": 1770993055.5,
    }
    first = (await api.post("/proxy/api/errors/", full))["id"]
    second = (await api.post("/proxy/api/errors/", {"error_message": "what"}))["id"]

    async def stored() -> list[dict[str, Any]]:
        found = await api.get("/proxy/api/errors/list/")
        return found["errors"] if found["total"] == 2 else []  # type: ignore[no-any-return]

    found = await eventually(stored, "the errors")
    assert [error["id"] for error in found] == [second, first]
    assert (found[0]["error_type"], found[0]["request_id"]) == ("OTHER", None)
    assert (found[1]["error_message"], found[1]["url"]) == ("timed out", "http://slow.example/")
    assert (found[1]["stack_trace"], found[1]["timestamp"]) == ("Traceback …", "2026-02-13T14:30:55.500000+00:00")
    only = await api.get("/proxy/api/errors/list/", error_type="timeout", source_ip="10.0.0.8")
    assert ([error["id"] for error in only["errors"]], only["total"], only["limit"]) == ([first], 1, 50)


async def test_a_failed_flow_is_among_the_errors_and_links_to_its_request(api: Api, ingest: Ingest) -> None:
    from megido_shared.testing import a_completed_flow

    flow = a_completed_flow()
    failed = events.FlowFailed(
        event_id=flow.event_id,
        node=flow.node,
        epoch=flow.epoch,
        seq=1,
        time_us=flow.time_us,
        flow_id=flow.flow_id,
        request=flow.request,
        failure=events.Failure(events.ErrorType.DNS_ERROR, "no such host"),
    )
    await api.publish(failed)
    (listed,) = await api.stored("example")
    assert (listed["status_code"], listed["error_type"], listed["state"]) == (None, "DNS_ERROR", "failed")
    found = await api.get("/proxy/api/errors/list/")
    assert [(error["error_type"], error["request_id"]) for error in found["errors"]] == [("DNS_ERROR", listed["id"])]
    detail = await api.get(f"/proxy/api/requests/{listed['id']}/")
    assert "response" not in detail
    assert detail["error"] == {"error_type": "DNS_ERROR", "error_message": "no such host", "stack_trace": ""}
    missing = await api.client.get(f"/proxy/api/requests/{listed['id']}/response/body")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_response")


async def test_authentication_attempts(api: Api, ingest: Ingest) -> None:
    attempt = {"source_ip": "10.0.0.7", "username": "mallory", "failure_reason": "bad password"}
    assert isinstance((await api.post("/proxy/api/auth-attempt/", attempt))["id"], int)
    await api.post("/proxy/api/auth-attempt/", {"source_ip": "10.0.0.7", "username": "alice", "success": True})
    await api.post("/proxy/api/auth-attempt/", attempt | {"timestamp": 1000000000})

    async def counted() -> bool:
        stats = await api.get("/proxy/api/stats/")
        return bool(stats["recent_auth_failures"] == 1 and stats["total_errors"] == 2)

    await eventually(counted, "one recent failure, both among the errors")
    errors = (await api.get("/proxy/api/errors/list/", error_type="AUTH_FAILURE"))["errors"]
    assert {error["error_message"] for error in errors} == {"bad password"}


async def test_statistics(api: Api, ingest: Ingest) -> None:
    empty = await api.get("/proxy/api/stats/")
    assert (empty["total_requests"], empty["avg_response_time"], empty["requests_by_method"]) == (0, 0.0, [])
    for method, protocol, duration in (("GET", "HTTP", 10), ("GET", "HTTPS", 20), ("PUT", "HTTPS", 60)):
        number = (await api.post("/proxy/api/requests/", REQUEST | {"method": method, "protocol": protocol}))["id"]
        await api.post("/proxy/api/responses/", {"request": number, "status_code": 200, "response_time": duration})
    await api.stored("users", 3)
    found = await api.get("/proxy/api/stats/")
    assert found["total_requests"] == 3
    assert found["requests_by_method"] == [{"method": "GET", "count": 2}, {"method": "PUT", "count": 1}]
    assert found["requests_by_protocol"] == [{"protocol": "HTTPS", "count": 2}, {"protocol": "HTTP", "count": 1}]
    assert found["avg_response_time"] == 30.0


async def test_active_rules(api: Api) -> None:
    assert await api.get("/interceptor/api/payload-rules/active/", source_app="browser") == {
        "success": True,
        "count": 0,
        "rules": [],
    }
