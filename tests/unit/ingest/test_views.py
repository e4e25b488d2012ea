"""Text views: readable, never refused by Postgres, marked where they are not the bytes."""

import pytest

from megido_ingest import views
from megido_shared import events
from megido_shared.testing import a_request


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"/plain", "/plain"),
        ("/grün".encode(), "/grün"),
        (b"/\xff\x00\xc3", "/%FF%00%C3"),
        (b"/\xed\xa0\x80", "/%ED%A0%80"),
    ],
)
def test_what_is_not_text_is_percent_encoded(raw: bytes, shown: str) -> None:
    assert views.percent(raw) == shown


@pytest.mark.parametrize(
    ("request_", "url"),
    [
        (a_request(), "https://api.example.com/users?page=1"),
        (a_request(scheme="http", port=8080), "http://api.example.com:8080/users?page=1"),
        (a_request(scheme="wss", host="::1", port=443), "wss://[::1]/users?page=1"),
        (a_request(host="a\0b"), "https://ab/users?page=1"),
        (a_request(target=b""), "https://api.example.com"),
    ],
)
def test_urls(request_: events.Request, url: str) -> None:
    assert views.url_of(request_) == url


def test_a_key_fits_into_an_index_and_stays_valid() -> None:
    assert views.key("ü" * 2000) == "ü" * (views.KEY_BYTES // 2)
    assert views.key("a" * views.KEY_BYTES) == "a" * views.KEY_BYTES
    assert views.key("€" * 400) == "€" * 333, "no half character at the end"
    assert views.key("a\0b") == "ab"


def test_the_last_header_of_a_name_counts_in_any_case() -> None:
    packed = events.pack_headers([(b"User-Agent", b"one"), (b"USER-AGENT", b"two"), (b"X-User-Agent", b"three")])
    assert views.header(packed, b"user-agent") == b"two"
    assert views.header(packed, b"host") == b""


def test_media_types() -> None:
    assert views.media_type(b"Text/HTML; charset=utf-8") == "text/html"
    assert views.media_type(b"") == ""
