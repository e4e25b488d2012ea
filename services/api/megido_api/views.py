"""How headers and bodies look in answers, alike for stored flows, posted ones and replays."""

import asyncio
import base64
import importlib.util
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import zstandard

from megido_shared import charsets
from megido_shared.clock import utc

type Pairs = Sequence[tuple[bytes, bytes]]

DECODED_LIMIT = 8 << 20
"""Bytes of a decoded body. A longer one (a compression bomb, too) is shown as it crossed the wire."""

_WINDOW_LIMIT = 8 << 20
_IN_LOOP_BYTES = 64 << 10


def iso(moment: datetime | int) -> str:
    """ISO 8601 of an aware datetime or of microseconds since the epoch."""
    return (utc(moment) if isinstance(moment, int) else moment).isoformat()


def text_of(raw: bytes) -> str:
    """Bytes for people: UTF-8 where valid, otherwise Latin-1, which shows every byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def header_fields(pairs: Pairs) -> dict[str, Any]:
    """`headers` (the last value by name), `raw_headers` (the truth) and `headers_encoding`, in which encoding
    the texts of `raw_headers` are the bytes that were on the wire."""
    try:
        raw = [(name.decode(), value.decode()) for name, value in pairs]
        encoding = "utf-8"
    except UnicodeDecodeError:
        raw = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs]
        encoding = "latin-1"
    return {"headers": dict(raw), "raw_headers": raw, "headers_encoding": encoding}


def first_header(pairs: Pairs, name: bytes) -> bytes:
    """The value of the first header of that name (lower case), b"" without one."""
    return next((value for found, value in pairs if found.lower() == name), b"")


async def body_fields(
    data: bytes, *, size: int, truncated: bool, sha256: bytes | None, headers: Pairs
) -> dict[str, Any]:
    """`body` as text: exact, with `body_encoding` `text`, when it is valid in its charset once the content
    coding is undone; otherwise lossy, with `base64`, and the stored bytes in `body_base64`.

    `body_size` and `sha256` are of the body as it crossed the wire, also when less of it is stored.
    """
    compressed = bool(first_header(headers, b"content-encoding"))
    if compressed or len(data) > _IN_LOOP_BYTES:
        shown = await asyncio.to_thread(_shown, data, headers)
    else:
        shown = _shown(data, headers)
    return shown | {
        "body_size": size,
        "truncated": truncated,
        "sha256": sha256.hex() if sha256 else None,
    }


def _shown(data: bytes, headers: Pairs) -> dict[str, Any]:
    plain, coding = decoded(data, first_header(headers, b"content-encoding"))
    charset = _charset(first_header(headers, b"content-type"))
    try:
        text = charsets.decode(plain, charset)
        text.encode()  # some charsets can name lone surrogates, which no JSON holds
        return {"body": text, "body_encoding": "text", "decoded_from": coding}
    except (ValueError, LookupError):  # invalid, or no charset that is decoded here
        return {
            "body": plain.decode("utf-8", "replace"),
            "body_encoding": "base64",
            "body_base64": base64.b64encode(data).decode(),
            "decoded_from": coding,
        }


def decoded(data: bytes, content_encoding: bytes) -> tuple[bytes, str | None]:
    """The body with its content coding undone, and the coding's name; as it was, and None, when there is no
    coding, an unknown one, broken data or more than the limit. A cut body is decoded as far as it goes."""
    name = content_encoding.strip().lower().decode("latin-1")
    undo = _CODINGS.get(name)
    if undo is None or not data:
        return data, None
    try:
        plain = undo(data)
    except (zlib.error, zstandard.ZstdError, _BROTLI_ERROR):
        return data, None
    return (data, None) if len(plain) > DECODED_LIMIT else (plain, name)


def _gzip(data: bytes) -> bytes:
    return zlib.decompressobj(wbits=47).decompress(data, DECODED_LIMIT + 1)


def _deflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, DECODED_LIMIT + 1)
    except zlib.error:
        return zlib.decompressobj(wbits=-15).decompress(data, DECODED_LIMIT + 1)  # what some servers mean by it


def _zstd(data: bytes) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT).stream_reader(data) as reader:
        return reader.read(DECODED_LIMIT + 1)


_CODINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate, "zstd": _zstd}
_BROTLI_ERROR: type[Exception] = zlib.error

if importlib.util.find_spec("brotli"):  # comes with mitmproxy; without it such bodies are shown as they are
    _brotli = importlib.import_module("brotli")
    _BROTLI_ERROR = _brotli.error
    _CODINGS["br"] = lambda data: bytes(_brotli.Decompressor().process(data, output_buffer_limit=DECODED_LIMIT + 1))


def _charset(content_type: bytes) -> str:
    """The charset parameter, UTF-8 without one."""
    for parameter in content_type.decode("latin-1").split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip("\"'") or "utf-8"
    return "utf-8"
