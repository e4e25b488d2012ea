"""What each kind of rule does to a request, and what it leaves alone."""

import asyncio
from typing import Any

import pytest
import re2
from mitmproxy.http import Headers
from mitmproxy.test import tflow

from megido_capture.counters import Counters
from megido_capture.rules.bodies import Rewriting
from megido_capture.rules.heads import RuleSet
from megido_capture.rules.injection import BODY_CAP, NotApplicable, inject
from megido_shared.config import PayloadRule
from megido_shared.rulelimits import MAX_ACTIVE, MAX_STEPS, SEARCHED_ALWAYS, compile_pattern


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
        (b"/p#top", b"/p?q=a%27%20b#top"),
        (b"/p?x=1#a?q=2", b"/p?x=1&q=a%27%20b#a?q=2"),
    ],
)
def test_param(path: bytes, expected: bytes) -> None:
    made = request(path)
    assert not inject([rule("param", "q", "a' b")], made)
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
    assert not inject([rule("cookie", "s")], made)
    assert list(made.headers.fields) == expected


def test_header_replaces_and_adds() -> None:
    made = request(fields=[(b"x", b"1"), (b"Y", b"2")])
    assert not inject([rule("header", "X", "3")], made)
    assert not inject([rule("header", "Z", "4")], made)
    assert dict(made.headers.items()) == {"x": "3", "Y": "2", "Z": "4"}


@pytest.mark.parametrize(
    ("media_type", "content", "expected"),
    [
        (b"application/json", b'{"a": 1, "f": 2}', b'{"a": 1, "f": "v"}'),
        (b"application/vnd.x+json; charset=utf-8", b"{}", b'{"f":"v"}'),
        (b"application/json", b"", b'{"f":"v"}'),
        (b"application/x-www-form-urlencoded", b"a=%20&f=1", b"a=%20&f=v"),
    ],
)
def test_body(media_type: bytes, content: bytes, expected: bytes) -> None:
    made = request(fields=[(b"Content-Type", media_type), (b"Content-Length", b"0")], content=content)
    assert not inject([rule("body", "f")], made)
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
    [(failed, why)] = inject([made], applied)
    assert failed is made and isinstance(why, NotApplicable)
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"n": 0.1000000000000000000001, "e": 1e2 , "f":3}', b'{"n": 0.1000000000000000000001, "e": 1e2 , "f":"v"}'),
        (b'{"n": 1e400,\n "u": "\\u00e9\\/" }', b'{"n": 1e400,\n "u": "\\u00e9\\/","f":"v" }'),
        (b'{"a":1,"a":2,"f":[{"f":"]\\""}],"\\u0066":3}', b'{"a":1,"a":2,"f":"v","\\u0066":"v"}'),
        (b'{"in":{"f":1}}', b'{"in":{"f":1},"f":"v"}'),
        (b" { } ", b' {"f":"v" } '),
    ],
)
def test_json_that_no_rule_names_keeps_its_bytes(text: bytes, expected: bytes) -> None:
    made = request(fields=JSON, content=text)
    assert not inject([rule("body", "f")], made)
    assert made.raw_content == expected


@pytest.mark.parametrize(
    ("media_type", "expected"),
    [
        (b"application/json", b'{"a": 1,"f":"last","g":"v"}'),
        (b"application/x-www-form-urlencoded", b'{"a": 1}&f=last&g=v'),
    ],
)
def test_rules_for_one_body_are_one_pass(media_type: bytes, expected: bytes) -> None:
    made = request(fields=[(b"Content-Type", media_type)], content=b'{"a": 1}')
    rules = [rule("body", "f", "first", id=1), rule("body", "g", id=2), rule("body", "f", "last", id=3)]
    counters = Counters()
    found = RuleSet(counters, "browser")
    found.replace(rules)
    assert found.apply_body(made) == (1, 2, 3) and made.raw_content == expected


@pytest.mark.parametrize(
    "name",
    [
        *("Content-Length", "transfer-encoding", "TE", "Trailer", "Connection", "Upgrade", "Keep-Alive"),
        *("Proxy-Authorization", "proxy-connection", ":path", "X Y", ""),
    ],
)
def test_a_header_that_frames_or_belongs_to_the_proxy_is_never_set(name: str) -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace([rule("header", name)])
    made = request()
    assert not rules.apply_head(made) and not made.headers.fields
    assert counters == {"rule_errors:1": 1}


def test_host_may_be_set() -> None:
    made = request(fields=[(b"Host", b"real")])
    assert not inject([rule("header", "host", "other")], made)
    assert made.headers.fields == ((b"Host", b"other"),) and made.host == tflow.tflow().request.host
    over_http2 = request()
    over_http2.data.http_version = b"HTTP/2.0"
    assert not inject([rule("header", "Host", "other")], over_http2)
    assert (over_http2.authority, over_http2.headers.fields) == ("other", ())


def test_more_rules_than_may_be_are_left_out_and_counted() -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace([rule(id=number, point=f"X-{number}") for number in range(MAX_ACTIVE + 2)])
    assert len(rules.apply_head(request())) == MAX_ACTIVE
    assert [name for name in counters if "errors" in name] == [f"rule_errors:{MAX_ACTIVE + n}" for n in range(2)]


def test_a_pattern_that_takes_too_much_memory_is_the_rules_error() -> None:
    counters = Counters()
    rules = RuleSet(counters, "browser")
    rules.replace([rule(target_url_pattern=r"http[\pL\pN]{20}7"), rule(id=2)])
    assert rules.apply_head(request()) == (2,) and counters["rule_errors:1"] == 1


async def test_a_pattern_that_fails_in_another_way_keeps_no_other_rule_out() -> None:
    counters, done = Counters(), asyncio.Event()
    rules = RuleSet(counters, "browser")
    rules.load([rule(target_url_pattern="\ud800"), rule(id=2)], done.set)  # no UTF-8: RE2 is not even asked
    await asyncio.wait_for(done.wait(), 20)
    assert rules.apply_head(request()) == (2,) and counters["rule_errors:1"] == 1


async def test_new_patterns_are_compiled_between_other_work() -> None:
    rules = RuleSet(Counters(), "browser")
    old, new = rule(point="Old"), [rule(id=n, target_url_pattern=rf"[\pL\pN]{{3}}.*|{n}") for n in range(200)]
    done: list[str] = []
    rules.replace([old])
    rules.load(new[:100], lambda: done.append("superseded"))
    await asyncio.sleep(0)
    rules.load(new, lambda: done.append("new"))
    assert rules.apply_head(request()) == (1,)  # what was goes on meanwhile
    turns = 0
    while not done:
        await asyncio.sleep(0)
        turns += 1
    assert done == ["new"] and turns > 10
    assert len(rules.apply_head(request())) == len(new)


async def test_what_is_compiled_is_kept_while_a_rule_uses_it() -> None:
    rules = RuleSet(Counters(), "browser")
    one, two = rule(target_url_pattern="one"), rule(id=2, target_url_pattern="two")
    done: list[str] = []
    rules.replace([one, two, rule(id=3, target_url_pattern="(")])
    rules.load(
        [two, rule(id=4, target_url_pattern="two"), rule(id=5, target_url_pattern="(")], lambda: done.append("at once")
    )
    assert done == ["at once"]
    rules.load([one], lambda: done.append("compiled again"))
    assert done == ["at once"]
    while len(done) < 2:
        await asyncio.sleep(0)


def test_a_url_too_long_for_a_pattern_skips_that_rule_alone() -> None:
    """`(a?){300}b` takes seconds for it, in which nobody is served."""
    counters = Counters()
    rules = RuleSet(counters, "browser")
    hungry = rule(point="Hungry", id=1, target_url_pattern="(a?){300}b?")
    rules.replace([hungry, rule(point="Usual", id=2, target_url_pattern=r"https?://[^/]+/a+\?id=[0-9]+")])
    long = request(path=b"/" + b"a" * 30_000 + b"?id=1")
    assert rules.apply_head(long) == (2,)
    assert "Usual" in long.headers and "Hungry" not in long.headers
    assert counters["rule_skipped:1"] == 1 and not counters["rule_skipped:2"] and not counters["rule_errors:1"]
    short = request(path=b"/" + b"a" * (SEARCHED_ALWAYS - 100))
    assert rules.apply_head(short) == (1,) and counters["rule_skipped:1"] == 1


@pytest.mark.parametrize("pattern", ["(a?){300}b", r"[\pL\pN]{5}", "|".join(f"host{n}" for n in range(400)), "a"])
def test_what_a_search_may_cost(pattern: str) -> None:
    found, size = compile_pattern(pattern), re2.compile(pattern).programsize
    assert found.longest >= SEARCHED_ALWAYS
    assert found.longest == SEARCHED_ALWAYS or found.longest * size <= MAX_STEPS
