"""What of a body is searched: text within limits, whatever its coding and charset, and nothing of binary data."""

import gzip
import random
import zlib

import brotli
import pytest
import zstandard

from megido_shared.bodytext import LIMIT, BodyText, body_text

TEXT = 'zwölf Boxkämpfer {"token": "abc"}'


def _headers(coding: str = "", content_type: str = "") -> list[tuple[bytes, bytes]]:
    return [(b"Content-Encoding", coding.encode()), (b"content-type", content_type.encode())]


@pytest.mark.parametrize(
    ("coding", "code"),
    [
        ("", bytes),
        ("identity", bytes),
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda data: zlib.compress(data, wbits=-15)),
        ("br", brotli.compress),
        ("zstd", zstandard.compress),
    ],
)
def test_the_coding_is_undone(coding: str, code: object) -> None:
    assert callable(code)
    assert body_text(code(TEXT.encode()), _headers(coding)) == BodyText(TEXT, lossy=False)


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "utf-16", "cp1252"])
def test_the_charset_is_applied(charset: str) -> None:
    headers = _headers(content_type=f'text/plain; charset="{charset}"')
    assert body_text(TEXT.encode(charset), headers) == BodyText(TEXT, lossy=False)


def test_binary_data_has_no_text() -> None:
    for data in (random.Random(1).randbytes(5000), b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(range(32)) * 9):
        assert body_text(data, []) == BodyText("", lossy=True)
    assert body_text(b"abc", _headers("unknown")) == BodyText("", lossy=True)
    assert body_text(b"no gzip", _headers("gzip")) == BodyText("", lossy=True)


def test_text_with_some_bad_bytes_is_text_and_lossy() -> None:
    assert body_text(b"abc \xff def", _headers(content_type="text/plain")) == BodyText("abc \ufffd def", lossy=True)
    assert body_text(b"abc" * 100 + b"\0", []) == BodyText("abc" * 100, lossy=True)
    assert body_text(b"abc", [], truncated=True) == BodyText("abc", lossy=True)
    assert body_text(b"", []) == BodyText("", lossy=False)


def test_the_length_is_bounded_and_a_character_is_not_cut_into_nonsense() -> None:
    for data, headers in (
        (("ä" * LIMIT).encode(), _headers()),
        (b"x" + ("ä" * LIMIT).encode(), _headers()),
        (gzip.compress(b"a" * (64 << 20)), _headers("gzip")),
        (brotli.compress(b"a" * (64 << 20)), _headers("br")),
        (zstandard.compress(b"a" * (64 << 20)), _headers("zstd")),
    ):
        found = body_text(data, headers)
        assert found.lossy
        assert set(found.text) <= set("xäa")
        assert LIMIT - 4 <= len(found.text.encode()) <= LIMIT


def test_a_cut_coding_gives_what_there_is() -> None:
    whole = gzip.compress("".join(f"line {n}\n" for n in range(9000)).encode())
    found = body_text(whole[: len(whole) // 2], _headers("gzip"), truncated=True)
    assert found.lossy
    assert found.text.startswith("line 0\nline 1\n")
