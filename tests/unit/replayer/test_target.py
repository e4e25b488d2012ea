"""Target overrides, as tables."""

import pytest

from megido_replayer.target import BadTarget, Target, override, parse

ORIGINAL = b"/api//v1/%7euser?x=1&x=2&y=%zz"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:3000", Target("http", "localhost", 3000, ORIGINAL)),
        ("http://localhost:3000/", Target("http", "localhost", 3000, ORIGINAL)),
        ("https://Other.Example", Target("https", "other.example", 443, ORIGINAL)),
        ("HTTP://h:80", Target("http", "h", 80, ORIGINAL)),
        ("http://[::1]:81", Target("http", "::1", 81, ORIGINAL)),
        ("http://localhost:3000/api/test", Target("http", "localhost", 3000, b"/api/test")),
        ("http://h/a?b=c%20d&e=#part", Target("http", "h", 80, b"/a?b=c%20d&e=")),
        ("http://h/?q=1", Target("http", "h", 80, b"/?q=1")),
        ("http://h?q=1", Target("http", "h", 80, b"/?q=1")),
        ("http://h/a b/ü", Target("http", "h", 80, b"/a%20b/%C3%BC")),
        ("http://h//a/../b/%2e%zz", Target("http", "h", 80, b"//a/../b/%2e%zz")),
        ("http://bücher.example", Target("http", "xn--bcher-kva.example", 80, ORIGINAL)),
        ("  http://h  ", Target("http", "h", 80, ORIGINAL)),
    ],
)
def test_override(url, expected):
    assert override(url, ORIGINAL) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:3000", "must begin with http"),
        ("ftp://h/", "must begin with http"),
        ("//h/", "must begin with http"),
        ("http://", "names no host"),
        ("http:///path", "names no host"),
        ("http://h:99999/", "no URL"),
        ("http://h:x/", "no URL"),
        ("http://[::1/", "no URL"),
        ("http://user:secret@h/", "credentials"),
    ],
)
def test_what_is_no_target(url, message):
    with pytest.raises(BadTarget, match=message):
        parse(url)


@pytest.mark.parametrize(
    ("target", "authority"),
    [
        (Target("http", "h", 80, b"/"), b"h"),
        (Target("https", "h", 80, b"/"), b"h:80"),
        (Target("https", "h", 443, b"/"), b"h"),
        (Target("http", "::1", 80, b"/"), b"[::1]"),
        (Target("http", "::1", 8080, b"/"), b"[::1]:8080"),
        (Target("http", "bücher.example", 81, b"/"), b"xn--bcher-kva.example:81"),
    ],
)
def test_authority(target, authority):
    assert target.authority == authority
