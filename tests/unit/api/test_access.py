import pytest

from megido_api.access import host_name, token_matches
from megido_api.problems import Problem
from megido_api.rules.patterns import check_pattern
from megido_api.settings import is_loopback
from megido_api.websockets.preview import preview
from megido_shared.db import codecs


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("", ""),
        ("a@localhost", "a@localhost"),
    ],
)
def test_host_names(authority: str, name: str) -> None:
    assert host_name(authority) == name


def test_tokens() -> None:
    assert token_matches("Bearer secret", "secret")
    assert token_matches("bearer  secret ", "secret")
    for wrong in ("", "Bearer", "Bearer ", "Bearer Secret", "Basic secret", "secret", "Bearer secret x", "Bearer é"):
        assert not token_matches(wrong, "secret")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.1", False),
        ("megido.lan", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("pattern", "position"), [("a(b", 3), ("x(?=y)", 1), (r"(a)\1", 3), ("ab[z", 2), ("a**", 1), ("ok(?<x", 2)]
)
def test_pattern_errors_say_where(pattern: str, position: int) -> None:
    with pytest.raises(Problem) as raised:
        check_pattern("target_url_pattern", pattern)
    assert raised.value.details["fields"][0]["position"] == position


def test_patterns_that_re2_takes() -> None:
    for pattern in ("", ".*", r"^https?://[^/]+/\w+$", "(?i)admin", "é+"):
        check_pattern("target_url_pattern", pattern)


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (b"", "TEXT", ""),
        (b"x" * 200, "TEXT", "x" * 200),
        (b"x" * 201, "TEXT", "x" * 200 + "..."),
        ("é".encode() * 500_000, "TEXT", "é" * 200 + "..."),
        (b"\x00\xff", "BINARY", "00ff"),
        (bytes(1_000_000), "BINARY", "0" * 200 + "..."),
        (b"beat", "PING", "beat"),
        (b"\xff", "PONG", "ff"),
        (b"a\xff", "TEXT", "a\ufffd"),
    ],
)
def test_previews_of_whole_and_partly_read_payloads(data: bytes, kind: str, expected: str) -> None:
    stored = codecs.pack(data)
    assert preview(stored, kind) == expected
    assert preview(stored[:160_000], kind) == expected
    assert preview(codecs.plain(data)[:160_000], kind) == expected
