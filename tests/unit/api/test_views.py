import gzip
import tracemalloc
import zlib
from typing import Any

import brotli
import pytest
import zstandard

from megido_api.views import DECODED_LIMIT, body_fields, decoded, header_fields

JSON = b'{"name": "\xc3\x84nne"}'


async def shown(data: bytes, **headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return await body_fields(data, size=len(data), truncated=False, sha256=None, headers=pairs)


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", gzip.compress(JSON, mtime=0)),
        ("x-gzip", gzip.compress(JSON, mtime=0)),
        ("GZIP ", gzip.compress(JSON, mtime=0)),
        ("deflate", zlib.compress(JSON)),
        ("deflate", zlib.compress(JSON)[2:-4]),
        ("zstd", zstandard.compress(JSON)),
        ("br", brotli.compress(JSON)),
    ],
)
async def test_content_codings_are_undone(coding: str, data: bytes) -> None:
    found = await shown(data, Content_Encoding=coding)
    assert (found["body"], found["body_encoding"]) == (JSON.decode(), "text")
    assert found["decoded_from"] == coding.strip().lower()
    assert found["body_size"] == len(data)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "br", "unknown", "gzip, br", ""])
async def test_what_cannot_be_decoded_is_shown_as_it_is(coding: str) -> None:
    found = await shown(b"no such thing \xff", Content_Encoding=coding)
    assert (found["body"], found["body_encoding"]) == ("no such thing \ufffd", "base64")
    assert found["body_base64"] == "bm8gc3VjaCB0aGluZyD/"
    assert found["decoded_from"] is None


@pytest.mark.parametrize(
    ("coding", "bomb"),
    [
        ("gzip", gzip.compress(bytes(200 << 20), compresslevel=9, mtime=0)),
        ("zstd", zstandard.compress(bytes(200 << 20))),
        ("br", brotli.compress(bytes(200 << 20), quality=3)),
    ],
)
def test_bombs_stay_small(coding: str, bomb: bytes) -> None:
    tracemalloc.start()
    plain, undone = decoded(bomb, coding.encode())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (plain, undone) == (bomb, None)
    assert peak < 4 * DECODED_LIMIT


def test_a_cut_body_is_decoded_as_far_as_it_goes() -> None:
    text = "".join(str(number) for number in range(100_000)).encode()
    plain, undone = decoded(gzip.compress(text)[:50_000], b"gzip")
    assert undone == "gzip"
    assert text.startswith(plain)
    assert len(plain) > 50_000


@pytest.mark.parametrize(
    ("content_type", "data", "body", "encoding"),
    [
        ("text/plain; charset=latin-1", b"\xe9", "é", "text"),
        ('text/plain; x=y; CharSet="utf-16"', "é".encode("utf-16"), "é", "text"),
        ("text/plain", b"\xe9", "\ufffd", "base64"),
        ("text/plain; charset=utf-8", b"a\0b", "a\0b", "text"),
        ("text/plain; charset=no-such", b"a\xff", "a\ufffd", "base64"),
        ("text/plain; charset=rot13", b"a", "a", "base64"),
        ("text/plain; charset=\0", b"a", "a", "base64"),
        ("text/plain; charset=punycode", b"a-" + b"z9a0" * 200_000, "a-" + "z9a0" * 200_000, "base64"),  # hours
        ("text/plain; charset=unicode_escape", rb"\ud800", r"\ud800", "base64"),
        ("text/plain; charset=undefined", b"a", "a", "base64"),
        ("text/plain; charset", b"a", "a", "text"),
        ("text/plain; charset=", b"a", "a", "text"),
    ],
)
async def test_charsets(content_type: str, data: bytes, body: str, encoding: str) -> None:
    found = await shown(data, Content_Type=content_type)
    assert (found["body"], found["body_encoding"]) == (body, encoding)


def test_headers_keep_order_case_duplicates_and_bytes() -> None:
    pairs = [(b"A", b"1"), (b"a", b"2"), (b"A", "é".encode())]
    assert header_fields(pairs) == {
        "headers": {"A": "é", "a": "2"},
        "raw_headers": [("A", "1"), ("a", "2"), ("A", "é")],
        "headers_encoding": "utf-8",
    }
    found = header_fields([(b"A", b"\xe9"), (b"B", "é".encode())])
    assert found["headers_encoding"] == "latin-1"
    assert [value.encode("latin-1") for _, value in found["raw_headers"]] == [b"\xe9", "é".encode()]
