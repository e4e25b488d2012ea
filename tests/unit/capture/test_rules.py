"""What each kind of rule does to a request, and what it leaves alone."""

from typing import Any

import pytest
from mitmproxy.http import Headers
from mitmproxy.test import tflow

from megido_capture.bodyrules import Rewriting
from megido_capture.counters import Counters
from megido_capture.rules import BODY_CAP, NotApplicable, RuleSet, inject
from megido_shared.config import PayloadRule


def rule(kind: Any = "header", point: str = "X", payload: str = "v", **more: Any) -> PayloadRule:
    fields = {"id": 1, "name": "r", "target_url_pattern": "."} | more
    return PayloadRule(injection_type=kind, injection_point=point, payload_content=payload, **fields)


def request(path: bytes = b"/p", fields: list[tuple[bytes, bytes]] | None = None, content: bytes = b""):  # type: ignore[no-untyped-def]
    made = tflow.tflow().request
    made.data.path, made.data.headers, made.data.content = path, Headers(fields or []), content
    return made


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/p", b"/p?q=a%27%20b"),
        (b"/p?x=1", b"/p?x=1&q=a%27%20b"),
        (b"/p?q=1&x=%7e&q=2", b"/p?q=a%27%20b&x=%7e"),
        (b"/p?%71=1", b"/p?q=a%27%20b"),
    ],
)
def test_param(path: bytes, expected: bytes) -> None:
    made = request(path)
    inject(rule("param", "q", "a' b"), made)
    assert made.data.path == expected


@pytest.mark.parametrize(
    ("cookies", "expected"),
    [
        ([], [(b"Cookie", b"s=v")]),
        ([(b"cookie", b"a=1; s=2; b=3")], [(b"cookie", b"a=1; s=v; b=3")]),
        ([(b"cookie", b"a=1"), (b"cookie", b"s=2")], [(b"cookie", b"a=1; s=v")]),
    ],
)
def test_cookie(cookies: list[tuple[bytes, bytes]], expected: list[tuple[bytes, bytes]]) -> None:
    made = request(fields=cookies)
    inject(rule("cookie", "s"), made)
    assert list(made.headers.fields) == expected


def test_header_replaces_and_adds() -> None:
    made = request(fields=[(b"x", b"1"), (b"Y", b"2")])
    inject(rule("header", "X", "3"), made)
    inject(rule("header", "Z", "4"), made)
    assert dict(made.headers.items()) == {"x": "3", "Y": "2", "Z": "4"}


@pytest.mark.parametrize(
    ("media_type", "content", "expected"),
    [
        (b"application/json", b'{"a": 1, "f": 2}', b'{"a":1,"f":"v"}'),
        (b"application/vnd.x+json; charset=utf-8", b"{}", b'{"f":"v"}'),
        (b"application/json", b"", b'{"f":"v"}'),
        (b"application/x-www-form-urlencoded", b"a=%20&f=1", b"a=%20&f=v"),
    ],
)
def test_body(media_type: bytes, content: bytes, expected: bytes) -> None:
    made = request(fields=[(b"Content-Type", media_type), (b"Content-Length", b"0")], content=content)
    inject(rule("body", "f"), made)
    assert made.raw_content == expected and made.headers["content-length"] == str(len(expected))


@pytest.mark.parametrize(
    ("made", "applied"),
    [
        (rule("header", "X", "a\r\nEvil: 1"), request()),
        (rule("cookie", "s", "a; b"), request()),
        (rule("body", "f"), request(fields=[(b"Content-Type", b"text/plain")])),
        (rule("body", "f"), request(fields=[(b"Content-Type", b"application/json")], content=b"[1]")),
        (
            rule("body", "f"),
            request(fields=[(b"Content-Type", b"application/json"), (b"Content-Encoding", b"gzip")], content=b"x"),
        ),
    ],
)
def test_what_has_no_place_for_it_is_left_alone(made: PayloadRule, applied: Any) -> None:
    before = (applied.data.path, applied.headers.fields, applied.raw_content)
    with pytest.raises(NotApplicable):
        inject(made, applied)
    assert (applied.data.path, applied.headers.fields, applied.raw_content) == before


def test_a_rule_that_fails_harms_only_itself() -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace(
        [
            rule(id=1, target_url_pattern="("),
            rule(id=2, payload="a\nb"),
            rule(id=3, point="Fine"),
            rule(id=4, active=False),
            rule(id=5, target_apps=("scanner",)),
            rule(id=6, point="Mine", target_apps=("browser", "x")),
            rule(id=7, target_url_pattern="^https://nowhere/"),
        ]
    )
    made = request()
    assert rules.apply_head(made) == (3, 6)
    assert (made.headers["Fine"], made.headers["Mine"]) == ("v", "v")
    assert dict(counters) == {"rule_errors:1": 1, "rule_errors:2": 1, "rule_hits:3": 1, "rule_hits:6": 1}


def test_a_streamed_body_is_read_whole_only_for_a_rule_that_wants_it() -> None:
    rules = RuleSet(Counters(), "browser")
    made = request(fields=[(b"Content-Type", b"application/json")])
    rules.replace([rule("header")])
    assert not rules.wants_body(made)
    rules.replace([rule("body", "f")])
    assert rules.wants_body(made) and not rules.wants_body(request())


JSON = [(b"Content-Type", b"application/json")]


def test_a_body_of_known_length_is_read_whole_up_to_the_cap() -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace([rule("body", "f")])
    made = request(fields=JSON)
    assert rules.must_buffer(made, BODY_CAP) and not rules.must_buffer(made, None)
    assert not counters
    assert not rules.must_buffer(made, BODY_CAP + 1)
    assert counters == {"rule_skipped:1": 1}


def test_a_whole_body_above_the_cap_is_left_alone_and_counted() -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace([rule("body", "f"), rule("body", "g", id=2, target_url_pattern="nowhere")])
    large = b'{"a":"' + b"x" * BODY_CAP + b'"}'
    made = request(fields=JSON, content=large)
    assert rules.apply_body(made) == ()
    assert made.raw_content == large and counters == {"rule_skipped:1": 1}


def rewritten(pieces: list[bytes], cap: int) -> tuple[list[list[bytes]], int]:
    """What each piece let go on, and how often the body was skipped."""
    skipped: list[None] = []
    inner: list[bytes] = []

    def tee(data: bytes) -> bytes:
        inner.append(data)
        return data

    stream = Rewriting(lambda body: b"<" + body + b">", tee, skip=lambda: skipped.append(None), cap=cap)
    found = []
    for piece in [*pieces, b""]:
        out = stream(piece)
        found.append([out] if isinstance(out, bytes) else list(out))
    assert inner[-1] == b"" and inner.count(b"") == 1
    return found, len(skipped)


def test_a_streamed_body_is_held_back_changed_and_sent() -> None:
    assert rewritten([b"ab", b"c"], cap=3) == ([[], [], [b"<abc>"]], 0)


def test_a_streamed_body_above_the_cap_goes_on_as_it_came() -> None:
    assert rewritten([b"ab", b"c", b"d"], cap=2) == ([[], [b"abc"], [b"d"], [b""]], 1)


def test_an_empty_streamed_body() -> None:
    assert rewritten([], cap=2) == ([[b"<>"]], 0)


def test_a_request_without_fields_in_its_body_is_no_failure() -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace([rule("body", "f")])
    assert rules.apply_body(request()) == rules.apply_body(request(content=b"x")) == ()
    assert not counters
