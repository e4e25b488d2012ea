from typing import Any

import pytest

from megido_api.fields import _to_pairs, body_bytes, clean, to_time_us
from megido_api.flows import posting
from megido_api.flows.schemas import PostedRequest
from megido_api.problems import Problem
from megido_api.publishing import Identity, split
from megido_shared import events, ids
from megido_shared.testing import a_completed_flow, a_request, a_response


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (1770993052.123456, 1770993052123456),
        ("1770993052.5", 1770993052500000),
        (-1, -1_000_000),
        ("2026-02-13T14:30:52.123456", 1770993052123456),
        ("2026-02-13T15:30:52.123456+01:00", 1770993052123456),
        ("2026-02-13T14:30:52Z", 1770993052000000),
        (None, None),
    ],
)
def test_times(value: Any, expected: int | None) -> None:
    assert to_time_us(value) == expected


@pytest.mark.parametrize(
    "value", ["", "soon", "NaN", "inf", float("inf"), True, [], {}, 1e30, -1e30, 1770993052123, "9" * 400]
)
def test_no_times(value: Any) -> None:
    with pytest.raises(ValueError):
        to_time_us(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        ("{}", []),
        ({"A": "b", "N": None, "I": 1}, [(b"A", b"b"), (b"N", b""), (b"I", b"1")]),
        ({"Set-Cookie": ["a=1", "b=2"]}, [(b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2")]),
        ('{"A": "\\u00e9"}', [(b"A", "é".encode())]),
        ([["a", "1"], ["A", "2"]], [(b"a", b"1"), (b"A", b"2")]),
    ],
)
def test_headers(value: Any, expected: list[tuple[bytes, bytes]]) -> None:
    assert _to_pairs(value) == expected


@pytest.mark.parametrize(
    "value", ["{", "5", '"x"', "null!", 5, True, [1], [["a"]], [["a", {}]], {"a": {}}, "[" * 100_000]
)
def test_no_headers(value: Any) -> None:
    with pytest.raises(ValueError):
        _to_pairs(value)


def test_clean_joins_pairs_and_replaces_lone_surrogates() -> None:
    assert clean("\ud83d\ude00 \ud800 x") == "\U0001f600 \ufffd x"
    assert clean("plain") == "plain"
    assert clean(5) == 5


def test_bodies() -> None:
    assert body_bytes(None, "text") == b""
    assert body_bytes("é\0", "text") == b"\xc3\xa9\0"
    assert body_bytes("/wA=", "base64") == b"\xff\0"
    for wrong in ("?", "/wA", "é==="):
        with pytest.raises(ValueError):
            body_bytes(wrong, "base64")


IDENTITY: Identity = {"event_id": ids.new_id(), "node": "api", "epoch": ids.new_id(), "time_us": 1}


def started(url: str, **more: Any) -> events.Request:
    posted = PostedRequest(**({"url": url, "method": "GET", "host": "h", "port": 80} | more))
    return posting.started(posted, 1, ids.new_id(), IDENTITY).request


@pytest.mark.parametrize(
    ("url", "more", "scheme", "target"),
    [
        ("http://h/a?b#c", {}, "http", b"/a?b#c"),
        ("HTTPS://h", {}, "https", b"/"),
        ("https://h?x", {}, "https", b"/?x"),
        ("https://h/a", {"protocol": "http"}, "http", b"/a"),
        ("http://h/ws", {"protocol": "wss"}, "wss", b"/ws"),
        ("/only/path?é", {"protocol": "HTTPS"}, "https", "/only/path?é".encode()),
        ("ftp://h/x", {}, "http", b"/x"),
    ],
)
def test_urls(url: str, more: dict[str, Any], scheme: str, target: bytes) -> None:
    request = started(url, **more)
    assert (request.scheme, request.target) == (scheme, target)


def test_no_url() -> None:
    with pytest.raises(Problem) as raised:
        started("h/a")
    assert raised.value.status == 400


def test_a_user_agent_beside_the_headers_becomes_one() -> None:
    def headers(**more: Any) -> list[tuple[bytes, bytes]]:
        return events.unpack_headers(started("http://h/", **more).headers)

    assert headers(user_agent="a/1") == [(b"User-Agent", b"a/1")]
    assert headers(user_agent="a/1", headers={"user-agent": "b/2"}) == [(b"user-agent", b"b/2")]
    assert headers() == []


@pytest.mark.parametrize(
    ("request_size", "response_size"),
    [(0, 0), (600_000, 50_000), (500_000, 300_000), (9, 2_000_000), (3_000_000, 900_000)],
)
def test_split_keeps_every_record_small_and_every_byte(request_size: int, response_size: int) -> None:
    sides = {"request": bytes(request_size), "response": b"r" * response_size}
    body = events.Body(data=sides["request"], size=request_size)
    flow = a_completed_flow(request=a_request(body=body), response=a_response(body=sides["response"]))
    records = split(flow)
    assert all(len(events.encode(record)) < 900_000 for record in records)
    *chunks, last = records
    assert isinstance(last, events.FlowCompleted)
    assert last.response is not None
    for side, found in (("request", last.request.body), ("response", last.response.body)):
        mine = [chunk for chunk in chunks if isinstance(chunk, events.BodyChunk) and chunk.side == side]
        assert [chunk.index for chunk in mine] == list(range(found.chunks))
        assert found.data + b"".join(chunk.data for chunk in mine) == sides[side]
        assert found.size == len(sides[side])
