"""One error shape, hostile input, nothing stored half, who may come in, and the OpenAPI document."""

import dataclasses
import json
from typing import Any

import jsonschema
import psycopg
import pytest

from megido_api.retention import queries as retention
from megido_api.settings import Settings
from megido_shared import events
from megido_shared.bus.base import Outgoing
from megido_shared.errors import ConfigurationError
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.api.harness import Api, Ingest, eventually, running

TOKEN = "0123456789abcdef-token"
REQUEST = {"url": "http://h.example/", "method": "GET", "host": "h.example", "port": 80}
POSTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "/proxy/api/requests/": (REQUEST, ["url", "method", "host", "port"]),
    "/proxy/api/responses/": ({"request": 1, "status_code": 200}, ["request", "status_code"]),
    "/proxy/api/websocket-messages/": (
        {"connection_id": "ws_1", "url": "ws://h/", "direction": "SEND", "message_type": "TEXT", "payload": "x"},
        ["connection_id", "url", "direction", "message_type", "payload"],
    ),
    "/proxy/api/errors/": ({"error_message": "x"}, ["error_message"]),
    "/proxy/api/auth-attempt/": ({"source_ip": "10.0.0.1"}, ["source_ip"]),
}
BAD_VALUES: dict[str, list[tuple[str, Any]]] = {
    "/proxy/api/requests/": [
        ("url", 5),
        ("url", "no url"),
        ("url", ""),
        ("port", 0),
        ("port", 70000),
        ("port", "http"),
        ("headers", "{broken"),
        ("headers", "[1, 2]"),
        ("headers", 5),
        ("headers", {"a": {"b": "c"}}),
        ("headers", {"a": "x" * (256 << 10)}),
        ("protocol", "GOPHER"),
        ("request_size", -1),
        ("request_size", 2**70),
        ("timestamp", "yesterday"),
        ("timestamp", 1770993052123456),
        ("timestamp", "9999-01-01T00:00:00"),
        ("timestamp", True),
        ("body", {"a": 1}),
        ("body_encoding", "hex"),
    ],
    "/proxy/api/responses/": [("request", "abc"), ("request", -1), ("request", 2**70), ("status_code", 1000),
        ("response_time", -1), ("response_time", 1e12), ("cached", "perhaps"), ("body", 5)],
    "/proxy/api/websocket-messages/": [("direction", "UP"), ("message_type", "FOO"), ("payload", 5),
        ("payload_size", "big"), ("connection_id", "w" * 256)],
    "/proxy/api/errors/": [("error_type", "STRANGE"), ("error_message", ""), ("stack_trace", [])],
    "/proxy/api/auth-attempt/": [("success", "perhaps"), ("username", {})],
}  # fmt: skip


def check_shape(document: Any) -> dict[str, Any]:
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"code", "message", "details"}
    assert error["code"]
    assert error["message"]
    assert isinstance(error["details"], dict)
    return error


def anything_stored(api: Api) -> int:
    tables = ("outbox", "posted_requests", "flows", "errors", "auth_attempts", "websocket_messages")
    with psycopg.connect(api.state.settings.common.database_url) as admin:
        row = admin.execute("SELECT " + " + ".join(f"(SELECT count(*) FROM {one})" for one in tables)).fetchone()
    assert row is not None
    return int(row[0])


async def test_missing_and_bad_fields_are_named_and_nothing_is_stored(api: Api) -> None:
    for path, (good, required) in POSTS.items():
        cases = [({name: value for name, value in good.items() if name != missing}, missing) for missing in required]
        cases += [(good | {name: value}, name) for name, value in BAD_VALUES[path]]
        for document, field in cases:
            error = check_shape(await api.post(path, document, status=400))
            names = {entry["field"].partition(".")[0] for entry in error["details"]["fields"]}
            assert names == {field}, (path, document)
    assert anything_stored(api) == 0


async def test_other_errors_have_the_same_shape(api: Api) -> None:
    cases = [
        ("GET", "/nothing/here", None, 404, "not_found"),
        ("GET", "/proxy/api/requests/123/", None, 404, "not_found"),
        ("GET", "/proxy/api/requests/abc/", None, 404, "not_found"),
        ("GET", "/proxy/api/requests/%00/", None, 404, "not_found"),
        ("GET", "/proxy/api/requests/٣/", None, 404, "not_found"),
        ("GET", "/proxy/api/requests/99999999999999999999999999/body", None, 404, "not_found"),
        ("DELETE", "/proxy/api/requests/", None, 405, "method_not_allowed"),
        ("PUT", "/proxy/api/stats/", b"{}", 405, "method_not_allowed"),
        ("POST", "/proxy/api/requests/", b"{broken", 400, "invalid"),
        ("POST", "/proxy/api/requests/", b"\x80abc", 400, "bad_request"),
        ("POST", "/proxy/api/requests/", b"[" * 100_000, 400, "bad_request"),
        ("POST", "/proxy/api/requests/", b"[]", 400, "invalid"),
        ("POST", "/proxy/api/requests/", b"null", 400, "invalid"),
        ("POST", "/proxy/api/requests/", b"", 400, "invalid"),
    ]
    for method, path, content, status, code in cases:
        headers = {"Content-Type": "application/json"} if content else {}
        answer = await api.client.request(method, path, content=content, headers=headers)
        assert (answer.status_code, check_shape(answer.json())["code"]) == (status, code), (method, path, content)
    form = await api.client.post("/proxy/api/requests/", data=REQUEST)
    assert (form.status_code, check_shape(form.json())["code"]) == (400, "invalid")
    assert anything_stored(api) == 0


async def test_nul_and_lone_surrogates_are_kept_as_far_as_text_can(api: Api, ingest: Ingest) -> None:
    hostile = "a\0b\ud800c\udc00\ud83d\ude00"
    document = REQUEST | {"url": f"http://h.example/{hostile}", "body": hostile, "user_agent": hostile}
    document |= {"headers": {hostile: hostile}, "source_app": hostile, "source_ip": hostile}
    number = (await api.post("/proxy/api/requests/", document))["id"]
    before = await api.get(f"/proxy/api/requests/{number}/")
    response = {"request": number, "status_code": 200, "error_message": hostile, "headers": json.dumps({"a": hostile})}
    await api.post("/proxy/api/responses/", response)
    message = POSTS["/proxy/api/websocket-messages/"][0]
    await api.post("/proxy/api/websocket-messages/", dict.fromkeys(message, hostile) | {
        "direction": "SEND", "message_type": "TEXT", "source_ip": hostile})  # fmt: skip
    await api.post("/proxy/api/errors/", {"error_message": hostile, "stack_trace": hostile, "url": hostile})
    await api.post("/proxy/api/auth-attempt/", {"source_ip": hostile, "username": hostile, "failure_reason": hostile})
    await api.stored("h.example")
    found = await api.get(f"/proxy/api/requests/{number}/")
    assert found["url"] == before["url"]
    assert found["url"].endswith("a%00b\ufffdc\ufffd\U0001f600")
    assert found["body_encoding"] == "base64"
    assert found["response"]["error_message"].startswith("a")

    async def all_stored() -> bool:
        stats = await api.get("/proxy/api/stats/")
        return bool(stats["total_errors"] == 2 and stats["total_websocket_messages"] == 1)

    await eventually(all_stored, "everything that was posted")
    assert ingest.letters == 0
    assert len((await api.get("/proxy/api/errors/list/"))["errors"]) == 2


async def test_every_byte_comes_back(api: Api, ingest: Ingest) -> None:
    every = bytes(range(256))
    pairs = [(b"X-A", every.replace(b"\n", b"").replace(b"\r", b"")), (b"x-a", b"two"), (b"X-\xe9", b"")]
    body = events.Body(data=every, size=256)
    flow = a_completed_flow(
        request=a_request(target=b"/" + every, method=b"G\xff", headers=events.pack_headers(pairs), body=body),
        response=a_response(headers=events.pack_headers(pairs), body=every, reason=b"O\xffK"),
    )
    await api.publish(flow)
    (listed,) = await api.stored("example")
    found = await api.get(f"/proxy/api/requests/{listed['id']}/")
    for side in (found, found["response"]):
        encoding = side["headers_encoding"]
        assert [(n.encode(encoding), v.encode(encoding)) for n, v in side["raw_headers"]] == pairs
        assert set(side["headers"]) == {"X-A", "x-a", "X-\xe9"}
        assert side["body_encoding"] == "base64"
    for path in ("body", "response/body"):
        answer = await api.client.get(f"/proxy/api/requests/{listed['id']}/{path}")
        assert answer.content == every
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith('attachment; filename="re')
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
    assert ingest.letters == 0


async def test_hosts(settings: Settings) -> None:
    async with running(dataclasses.replace(settings, allow_hosts=("megido.lan",))) as api:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "megido.lan:8000"):
            assert (await api.client.get("/proxy/api/stats/", headers={"Host": host})).status_code == 200, host
        for host in ("evil.example", "localhost.evil.example:8000", "megido.lan.evil", "[::2]", "", "a@localhost"):
            answer = await api.client.get("/proxy/api/stats/", headers={"Host": host})
            assert (answer.status_code, check_shape(answer.json())["code"]) == (403, "host_not_allowed"), host
            assert (await api.client.get("/livez", headers={"Host": host})).status_code == 200


async def test_browser_writes_from_other_sites(api: Api) -> None:
    refused: list[dict[str, str]] = [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "cross-site"},
    ]
    for headers in refused:
        answer = await api.client.post("/proxy/api/errors/", json={"error_message": "x"}, headers=headers)
        assert (answer.status_code, check_shape(answer.json())["code"]) == (403, "cross_site"), headers
        assert (await api.client.get("/proxy/api/stats/", headers=headers)).status_code == 200
    assert anything_stored(api) == 0
    for headers in (
        {},
        {"Origin": "http://localhost:8000"},
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"},
    ):
        answer = await api.client.post("/proxy/api/errors/", json={"error_message": "x"}, headers=headers)
        assert answer.status_code == 201, headers


def paths(api: Api) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = api.app.openapi()["paths"]
    return found


async def test_off_loopback_everything_but_the_probes_asks_for_the_token(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="MEGIDO_API_TOKEN"):
        dataclasses.replace(settings, host="0.0.0.0").check()
    async with running(dataclasses.replace(settings, host="0.0.0.0", token=TOKEN)) as api:
        for path, operations in paths(api).items():
            for method in operations:
                url = path.replace("{reference}", "1").replace("{rule_id}", "1").replace("{job_id}", "1")
                for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}):
                    answer = await api.client.request(method, url, headers=headers)
                    expected = {200} if path in ("/livez", "/readyz") else {401}
                    assert {answer.status_code} == expected, (method, path)
                    if answer.status_code == 401:
                        assert answer.headers["www-authenticate"] == "Bearer"
                        check_shape(answer.json())
        for path in ("/docs", "/openapi.json", "/"):
            assert (await api.client.get(path)).status_code == 401
        allowed = await api.client.get("/proxy/api/stats/", headers={"Authorization": f"bearer {TOKEN}"})
        assert allowed.status_code == 200


async def test_every_operation_is_documented(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()
    operations = [
        (path, method, operation) for path, found in document["paths"].items() for method, operation in found.items()
    ]
    assert len(operations) >= 24
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(set(names)) == len(names)
    for path, method, operation in operations:
        assert operation["summary"], (path, method)
        assert operation["tags"], (path, method)
        assert "422" not in operation["responses"], (path, method)
    page = await api.client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "unsafe-inline" not in page.headers["content-security-policy"]
    for path, _, operation in operations:
        assert path in page.text
        assert f'id="{operation["operationId"]}"' in page.text
    assert "<script" not in page.text
    assert "https://" not in page.text.replace("http:// or https://", "")
    leads = await api.client.get("/")
    assert (leads.status_code, leads.headers["location"]) == (307, "/docs")


async def test_answers_are_as_documented(api: Api, ingest: Ingest) -> None:
    document = (await api.client.get("/openapi.json")).json()
    await api.publish(a_completed_flow())
    (listed,) = await api.stored("example")
    for post in ("errors", "websocket-messages"):
        await api.post(f"/proxy/api/{post}/", POSTS[f"/proxy/api/{post}/"][0])
    await api.post("/interceptor/api/payload-rules/", {
        "name": "a", "target_url_pattern": "b", "injection_type": "param", "injection_point": "c",
        "payload_content": "d"})  # fmt: skip

    async def stored() -> bool:
        stats = await api.get("/proxy/api/stats/")
        return bool(stats["total_errors"] and stats["total_websocket_messages"])

    await eventually(stored, "what was posted")
    producer = await api.bus.producer("test")
    await producer.append([Outgoing("megido.flows", b"key", b"\xc1 no event")])
    await producer.close()

    async def dead() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await api.get("/proxy/api/dead-letters/"))["dead_letters"]
        return found

    (letter,) = await eventually(dead, "the dead letter")
    await api.send("PUT", f"/proxy/api/retention/pins/{listed['id']}/")
    await api.send("PATCH", "/proxy/api/retention/", {"days": 7})
    async with api.state.database.engine.begin() as connection:
        await retention.ask(connection, dry_run=False, by="test")
    checked = 0
    for path, operations in document["paths"].items():
        content = operations.get("get", {}).get("responses", {}).get("200", {}).get("content", {})
        if "application/json" not in content or path.startswith("/proxy/api/replays"):
            continue
        url = path.replace("{reference}", str(listed["id"])).replace("{rule_id}", "1").replace("{scope}", "app:x")
        url = url.replace("{letter_id}", str(letter["id"])).replace("{run_id}", "1")
        schema = content["application/json"]["schema"] | {"components": document["components"]}
        jsonschema.validate(await api.get(url), schema)
        checked += 1
    assert checked == 23


async def test_metrics_name_routes_not_urls(api: Api) -> None:
    await api.get("/proxy/api/requests/77/", status=404)
    await api.client.get("/some/hostile/path")
    text = (await api.client.get("/metrics")).text
    assert 'route="/proxy/api/requests/{reference}/",status="404"' in text
    assert "hostile" not in text
    assert "/77/" not in text
    assert "megido_api_request_duration_seconds_bucket" in text
