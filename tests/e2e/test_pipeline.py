"""From a client's request to Postgres, the JSON logs, the API and a replay; on the local bus and on Kafka."""

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import websockets

from megido_shared.datadir import DataDir
from megido_shared.db.embedded import database_url
from tests.e2e.stack import Stack
from tests.support.site import H2Site, Site
from tests.support.waiting import until

pytestmark = pytest.mark.e2e


def rows_in_postgres(stack: Stack, url_part: str) -> list[dict[str, Any]]:
    with psycopg.connect(database_url(DataDir(stack.data_dir)), row_factory=psycopg.rows.dict_row) as connection:
        return connection.execute("SELECT * FROM flows WHERE url LIKE %s", [f"%{url_part}%"]).fetchall()


def everywhere(stack: Stack, url_part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flow in the API's list, after it was found complete and once in the API, Postgres and the JSON logs."""
    listed = stack.wait_for(url_part)[0]
    assert len(rows_in_postgres(stack, url_part)) == 1
    logged = stack.wait_for_log("requests", url_part)[0]
    assert (logged["id"], logged["method"], logged["url"]) == (listed["id"], listed["method"], listed["url"])
    detail = stack.get(f"/proxy/api/requests/{listed['id']}/")[1]
    return listed, detail


def test_ready_soon_and_everything_is_on_the_screen(stack: Stack) -> None:
    screen = stack.screen()
    for expected in (stack.proxy.removeprefix("http://"), str(stack.ca), str(stack.api_port), "curl"):
        assert expected in screen
    for path in ("/livez", "/readyz", "/metrics", "/docs", "/"):
        stack.get(path)


def test_http1_with_body_and_bytes(stack: Stack, site: Site) -> None:
    url = f"http://localhost:{site.http_port}/echo?case=http1&q=a%20b"
    answer = stack.curl("-X", "POST", "-H", "X-CaSe: One", "-H", "x-case: two", "-d", "name=value", url)
    assert answer.stdout == "name=value"
    listed, detail = everywhere(stack, "case=http1")
    assert (listed["method"], listed["protocol"], listed["status_code"]) == ("POST", "HTTP", 200)
    assert listed["source_ip"] == "127.0.0.1"
    assert (detail["body"], detail["response"]["body"]) == ("name=value", "name=value")
    assert [pair for pair in detail["raw_headers"] if pair[0].lower() == "x-case"] == [
        ["X-CaSe", "One"],
        ["x-case", "two"],
    ]
    responded = until(
        lambda: [entry for entry in stack.log_files("responses") if "case=http1" in json.dumps(entry)],
        "its response log",
    )
    assert responded[0]["status_code"] == 200


def test_https_over_http1(stack: Stack, site: Site) -> None:
    answer = stack.curl("-w", "%{http_version}", f"https://localhost:{site.https_port}/api/data?case=h1")
    assert answer.stdout == '{"message": "data arrived"}1.1'
    listed, detail = everywhere(stack, "case=h1")
    assert (listed["protocol"], listed["status_code"]) == ("HTTPS", 200)
    assert json.loads(detail["response"]["body"]) == {"message": "data arrived"}


def test_https_over_http2(stack: Stack, h2_site: H2Site) -> None:
    answer = stack.curl("--http2", "-w", " %{http_version}", f"https://localhost:{h2_site.port}/x?case=h2")
    assert answer.stdout == "/x?case=h2 2"
    listed, detail = everywhere(stack, "case=h2")
    assert (listed["protocol"], listed["status_code"]) == ("HTTPS", 200)
    assert detail["response"]["body"] == "/x?case=h2"


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_websocket_conversation(stack: Stack, site: Site, scheme: str) -> None:
    port = site.http_port if scheme == "ws" else site.https_port
    url = f"{scheme}://localhost:{port}/ws?case={scheme}"
    context = ssl.create_default_context(cafile=str(stack.ca)) if scheme == "wss" else None
    async with websockets.connect(url, proxy=stack.proxy, ssl=context) as socket:
        await socket.send("hello")
        assert await socket.recv() == "echo hello"
        await socket.send(bytes(range(256)))
        assert await socket.recv() == bytes(range(256))
        await (await socket.ping(b"beat"))
    listed = await asyncio.to_thread(stack.wait_for, f"case={scheme}")
    assert (listed[0]["protocol"], listed[0]["status_code"]) == (scheme.upper(), 101)

    def messages() -> list[dict[str, Any]]:
        found = stack.get("/proxy/api/websocket-messages/list/?limit=1000")[1]["messages"]
        mine = [message for message in found if f"case={scheme}" in message["url"]]
        return mine if sum(message["message_type"] == "CLOSE" for message in mine) >= 1 else []

    found = await asyncio.to_thread(until, messages, "the conversation")
    texts = [(m["direction"], m["payload"]) for m in found if m["message_type"] == "TEXT"]
    assert sorted(texts) == [("RECEIVE", "echo hello"), ("SEND", "hello")]
    kinds = Counter((m["direction"], m["message_type"]) for m in found if m["message_type"] in ("BINARY", "CLOSE"))
    assert kinds[("SEND", "BINARY")] == kinds[("RECEIVE", "BINARY")] == 1
    assert sum(count for (_, kind), count in kinds.items() if kind == "CLOSE") == 1
    binary = [message for message in found if message["message_type"] == "BINARY"]
    assert {message["direction"] for message in binary} == {"SEND", "RECEIVE"}
    assert all(message["payload_size"] == 256 and message["payload"].startswith("00010203") for message in binary)
    assert {"PING", "PONG"} <= {message["message_type"] for message in found}
    connection = found[0]["connection_id"]
    assert connection.startswith("ws_")
    assert {message["connection_id"] for message in found} == {connection}

    def files() -> list[Path]:
        written = sorted(stack.log_dir.glob(f"websockets/{connection}_*/*.json"))
        return written if len(written) >= len(found) else []

    written = await asyncio.to_thread(until, files, "the conversation's log files")
    assert any(path.name.endswith("_SEND_TEXT.json") for path in written)
    assert len(written) == len(
        stack.get(f"/proxy/api/websocket-messages/list/?connection_id={connection}")[1]["messages"]
    )


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port whose backlog is full: connecting to it neither succeeds nor fails."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = held.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.fixture
def refused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def errors_of(stack: Stack, marker: str) -> list[dict[str, Any]]:
    found = stack.get("/proxy/api/errors/list/?limit=1000")[1]["errors"]
    return [error for error in found if marker in error["url"]]


def failed(stack: Stack, url: str, marker: str, error_type: str) -> None:
    answer = stack.curl("-o", "/dev/null", "-w", "%{http_code} %{http_connect}", url, check=False)
    assert "502" in answer.stdout, answer
    listed = stack.wait_for(marker)[0]
    assert listed["status_code"] is None
    found = until(lambda: errors_of(stack, marker), f"the error for {marker}")
    assert [(error["error_type"], error["request_id"]) for error in found] == [(error_type, listed["id"])]
    assert found[0]["error_message"]
    assert len(rows_in_postgres(stack, marker)) == 1
    stack.wait_for_log("errors", marker)


def test_upstream_refuses(stack: Stack, refused_port: int) -> None:
    failed(stack, f"http://localhost:{refused_port}/?case=refused", f"localhost:{refused_port}", "CONNECTION_RESET")


def test_upstream_refuses_a_tunnel(stack: Stack, refused_port: int) -> None:
    """There is no request yet, so no flow: an error of its own."""
    place = f"127.0.0.1:{refused_port}"
    answer = stack.curl("-o", "/dev/null", "-w", "%{http_connect}", f"https://{place}/", check=False)
    assert answer.stdout == "502"
    found = until(lambda: errors_of(stack, place), f"the error for {place}")
    assert [(error["error_type"], error["request_id"]) for error in found] == [("CONNECTION_RESET", None)]
    assert (found[0]["url"], found[0]["source_ip"]) == (f"https://{place}/", "127.0.0.1")
    stack.wait_for_log("errors", place)
    assert stack.requests(place) == []


def test_client_that_does_not_trust_us(stack: Stack, site: Site, upstream_ca_file: Path) -> None:
    place = f"localhost:{site.https_port}"
    known = len(errors_of(stack, place))
    answer = stack.curl("--cacert", str(upstream_ca_file), "--capath", "/dev/null", f"https://{place}/", check=False)
    assert answer.returncode == 60, answer
    until(lambda: len(errors_of(stack, place)) > known, f"the error for {place}")
    error = errors_of(stack, place)[0]
    assert (error["error_type"], error["request_id"]) == ("SSL_ERROR", None)
    assert (error["url"], error["source_ip"]) == (f"https://{place}/", "127.0.0.1")
    assert "--passthrough-hosts localhost" in error["error_message"]
    assert place in stack.run("errors", "--type", "ssl_error", "--api-url", stack.api).stdout


def test_upstream_times_out(stack: Stack) -> None:
    with black_hole() as port:
        failed(stack, f"http://127.0.0.1:{port}/?case=timeout", "case=timeout", "TIMEOUT")


def test_upstream_does_not_resolve(stack: Stack) -> None:
    failed(stack, "http://no-such-host.invalid/?case=dns", "no-such-host.invalid", "DNS_ERROR")


def test_upstream_breaks_tls(stack: Stack, untrusted_site: Site) -> None:
    failed(stack, f"https://localhost:{untrusted_site.https_port}/?case=tls", "case=tls", "SSL_ERROR")


def test_visible_within_a_second(stack: Stack, site: Site) -> None:
    """One flow at a time on an idle line: from the client's answer to the API's. The bound is the contract's."""
    waits = []
    for number in range(5):
        stack.curl(f"http://localhost:{site.http_port}/api/data?soon={number}x")
        answered = time.monotonic()
        until(lambda n=number: stack.requests(f"soon={n}x"), "the flow", every=0.01)  # type: ignore[misc]
        waits.append(time.monotonic() - answered)
    assert sorted(waits)[2] < 1.0, waits


def test_each_flow_once_under_load(stack: Stack, site: Site) -> None:
    count = 300
    url = f"http://localhost:{site.http_port}/api/data?load="

    def some(start: int) -> None:
        stack.curl("-o", "/dev/null", *[f"{url}{n}x" for n in range(start, start + 50)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(some, range(0, count, 50)))
    found = stack.wait_for("?load=", count)
    assert {flow["url"].split("load=")[1] for flow in found} == {f"{n}x" for n in range(count)}
    assert len(stack.wait_for_log("requests", "?load=", count)) == count


def test_list_filters_and_pages(stack: Stack, site: Site) -> None:
    for number in range(5):
        stack.curl("-A", "agent/7", f"http://localhost:{site.http_port}/api/data?page={number}x")
    stack.wait_for("?page=", 5)
    newest_first = [flow["id"] for flow in stack.requests("?page=")]
    assert newest_first == sorted(newest_first, reverse=True)
    by_offset = [
        stack.get(f"/proxy/api/requests/?search=%3Fpage%3D&limit=1&offset={n}")[1]["requests"][0]["id"]
        for n in range(5)
    ]
    assert by_offset == newest_first
    assert stack.requests("?page=", method="post") == []
    assert len(stack.requests("?page=", method="get", protocol="http", source_ip="127.0.0.1", is_replay="false")) == 5
    assert stack.get("/proxy/api/requests/?limit=nonsense", expect=(400,))[1]["error"]["code"]


def test_replay_to_the_original_and_to_another_target(stack: Stack, site: Site) -> None:
    url = f"http://localhost:{site.http_port}/echo?case=replay"
    stack.curl("-X", "PUT", "-H", "X-Twice: 1", "-H", "x-twice: 2", "--data-binary", "payload", url)
    original = stack.wait_for("case=replay")[0]
    before = len(site.received)
    answer = stack.post(f"/proxy/api/requests/{original['id']}/replay/", {})[1]
    assert answer["success"], answer
    assert (answer["response"]["status_code"], answer["response"]["body"]) == (200, "payload")
    assert site.received[before:] == [("PUT", "/echo?case=replay")]
    replayed = stack.get(f"/proxy/api/requests/{answer['replayed_request_id']}/")[1]
    assert (replayed["is_replay"], replayed["original_request_id"]) == (True, original["id"])
    assert replayed["response"]["body"] == "payload"

    printed = stack.run(
        "replay", str(original["id"]), "--target-url", f"http://127.0.0.1:{site.http_port}", "--verbose"
    )
    assert "200" in printed.stdout
    assert "payload" in printed.stdout
    found = stack.wait_for("case=replay", 2, is_replay="true")
    assert {flow["host"] for flow in found} == {"localhost", "127.0.0.1"}

    status, accepted = stack.post(f"/proxy/api/requests/{original['id']}/replay/", {"wait": False}, expect=(202,))
    assert status == 202
    assert accepted["job_id"]
    stack.wait_for("case=replay", 3, is_replay="true")
    stack.post("/proxy/api/requests/999999999/replay/", {}, expect=(404,))


def test_replay_range_from_the_command_line(stack: Stack, site: Site) -> None:
    for number in range(3):
        stack.curl(f"http://localhost:{site.http_port}/api/data?range={number}x")
    ids = sorted(flow["id"] for flow in stack.wait_for("?range=", 3))
    # An end far beyond the newest means "all there are", not "what this run stores as well".
    done = stack.run("replay-range", str(ids[0]), "1000000000", "--delay", "0.1", check=False)
    assert "replayed" in done.stderr
    assert len(stack.wait_for("?range=", 3, is_replay="true")) == 3


def test_command_line_list_and_show(stack: Stack, site: Site) -> None:
    stack.curl("-X", "POST", "-d", "shown", f"http://localhost:{site.http_port}/echo?case=cli")
    flow = stack.wait_for("case=cli")[0]
    listed = stack.run("list", "--limit", "50", "--method", "POST", "--url", "case=cli")
    assert str(flow["id"]) in listed.stdout
    assert "shown" in stack.run("show", str(flow["id"])).stdout
    unknown = stack.run("show", "999999999", check=False)
    assert unknown.returncode == 1
    assert len(unknown.stderr.strip().splitlines()) == 1


def test_an_older_capture_tool_posts_to_the_api(stack: Stack) -> None:
    request = {"url": "http://old.example/posted?case=posted", "method": "GET", "host": "old.example", "port": 80}
    posted = stack.post("/proxy/api/requests/", request | {"headers": '{"User-Agent": "old/1"}'}, expect=(201,))[1][
        "id"
    ]
    answer = {"request": posted, "status_code": 204, "headers": {"A": "b"}, "body": "", "response_time": 12.5}
    stack.post("/proxy/api/responses/", answer, expect=(201,))

    def stored() -> bool:
        found = stack.requests("case=posted")
        return [(flow["id"], flow["status_code"]) for flow in found] == [(posted, 204)]

    until(stored, "the posted flow")
    stack.wait_for_log("requests", "case=posted")
    rules = stack.get("/interceptor/api/payload-rules/active/?source_app=browser")[1]
    assert rules["success"] is True
    assert rules["count"] == len(rules["rules"])


def test_statistics_agree_with_the_list(stack: Stack) -> None:
    def agree() -> bool:
        stats = stack.get("/proxy/api/stats/")[1]
        total = stack.get("/proxy/api/requests/?limit=1")[1]["total"]
        by_method = sum(entry["count"] for entry in stats["requests_by_method"])
        return bool(stats["total_requests"] == total == by_method > 0)

    until(agree, "statistics that agree with the list")
