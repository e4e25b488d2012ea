"""The client against answers as rest.md describes them."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

import megido
from megido.client import ApiError, Client, api_url_from
from megido_shared.errors import Unavailable


class Api(ThreadingHTTPServer):
    """Answers what `answers` has for a path, and keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(
            {
                "path": path.path,
                "query": dict(parse_qsl(path.query)),
                "body": json.loads(body) if body else None,
                "token": self.headers.get("Authorization"),
            }
        )
        status, document = self.server.answers[path.path].pop(0)
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    Thread(target=api.serve_forever, daemon=True).start()
    yield api
    api.shutdown()
    api.server_close()


def page(*numbers: int, cursor: str | None = None) -> dict[str, Any]:
    return {"requests": [{"id": n} for n in numbers], "total": 9, "limit": 2, "offset": 0, "next_cursor": cursor}


def test_all_pages_are_read_by_cursor(api: Api) -> None:
    api.answers["/proxy/api/requests/"] = [(200, page(3, 2, cursor="c1")), (200, page(1))]
    with Client(api.url) as client:
        assert [found["id"] for found in client.each_request(method="POST", search="")] == [3, 2, 1]
    assert api.asked[0]["query"]["method"] == "POST"
    assert "search" not in api.asked[0]["query"]
    assert api.asked[1]["query"]["cursor"] == "c1"


def test_the_token_is_sent(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.answers["/proxy/api/stats/"] = [(200, {}), (200, {})]
    with Client(api.url, "one") as client:
        client.stats()
    monkeypatch.setenv("MEGIDO_API_TOKEN", "two")
    with Client(api.url) as client:
        client.stats()
    assert [asked["token"] for asked in api.asked] == ["Bearer one", "Bearer two"]


def test_a_proxy_of_the_environment_is_left_alone(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    api.answers["/proxy/api/stats/"] = [(200, {"total_requests": 1})]
    with megido.Client(api.url) as client:
        assert client.stats() == {"total_requests": 1}


def test_a_refusal_has_the_api_s_words(api: Api) -> None:
    problem = {"error": {"code": "not_found", "message": "no request has the id 7", "details": {}}}
    api.answers["/proxy/api/requests/7/"] = [(404, problem)]
    with Client(api.url) as client, pytest.raises(ApiError, match="no request has the id 7") as caught:
        client.request(7)
    assert (caught.value.status, caught.value.code) == (404, "not_found")


@pytest.mark.parametrize("answer", [(502, b"<html>bad gateway</html>"), (200, b"hello"), (500, [1])])
def test_what_is_no_megido_is_named(api: Api, answer: tuple[int, Any]) -> None:
    api.answers["/proxy/api/stats/"] = [answer]
    with Client(api.url) as client, pytest.raises(ApiError, match="check --api-url"):
        client.stats()


def test_an_api_that_is_away_says_what_to_do() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="megido up"):
        client.stats()
    with Client("nonsense") as client, pytest.raises(Unavailable, match="--api-url"):
        client.stats()


def test_a_replay_s_options_travel(api: Api) -> None:
    api.answers["/proxy/api/requests/5/replay/"] = [
        (200, {"success": True}),
        (202, {"job_url": "/proxy/api/replays/x/"}),
    ]
    with Client(api.url) as client:
        assert client.replay(5, target_url="http://localhost:3000", verify_tls=False)["success"]
        with pytest.raises(Unavailable, match="/proxy/api/replays/x/"):
            client.replay(5)
    assert api.asked[0]["body"] == {"verify_tls": False, "timeout": 30.0, "target_url": "http://localhost:3000"}
    assert "target_url" not in api.asked[1]["body"]


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, "http://localhost:8000"),
        ({"PROXY_API_URL": "http://a"}, "http://a"),
        ({"PROXY_API_URL": "http://a", "MEGIDO_API_URL": "http://b"}, "http://b"),
    ],
)
def test_where_the_api_is(env: dict[str, str], url: str) -> None:
    assert api_url_from(env) == url


def test_the_package_has_nothing_else() -> None:
    with pytest.raises(AttributeError):
        _ = megido.nothing  # type: ignore[attr-defined]
