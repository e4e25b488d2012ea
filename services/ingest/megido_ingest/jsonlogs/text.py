"""Bytes from the network as JSON values. Pure; nothing here is lossy without saying so."""

import base64
import re
import zlib
from collections.abc import Sequence

import zstandard

from megido_shared import charsets

_DECODED_LIMIT = 8 << 20
"""Bytes that a compressed body may grow to; a larger one is written as it crossed the wire."""

_CHARSET = re.compile(rb"charset\s*=\s*\"?([A-Za-z0-9_.:-]+)", re.IGNORECASE)
type Pairs = Sequence[tuple[bytes, bytes]]


def field(raw: bytes) -> str:
    """A header's name or value: UTF-8 when it is that, otherwise latin-1, which loses no byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def header_fields(pairs: Pairs) -> dict[str, object]:
    """`headers`: the last value by name; `raw_headers`: every pair in order, with case and duplicates."""
    texts = [(field(name), field(value)) for name, value in pairs]
    return {"headers": dict(texts), "raw_headers": texts}


def body_fields(data: bytes, pairs: Pairs, *, size: int, sha256: bytes | None, truncated: bool) -> dict[str, object]:
    """`body` is text when the bytes are valid in their charset, otherwise base64 of the bytes as they crossed the
    wire; `body_encoding` says which. A body that was compressed is shown as its text with `decoded_from`."""
    fields: dict[str, object] = {}
    coding = _header(pairs, b"content-encoding").decode("latin-1").strip().lower()
    plain = data if coding in ("", "identity") else _decompress(data, coding)
    text = None if plain is None else _text(plain, _header(pairs, b"content-type"))
    if text is None:
        fields["body"] = base64.b64encode(data).decode()
        fields["body_encoding"] = "base64"
    else:
        fields["body"] = text
        fields["body_encoding"] = "text"
        if data and plain is not data:
            fields["decoded_from"] = coding
    fields["body_size"] = size
    fields["truncated"] = truncated
    fields["sha256"] = sha256.hex() if sha256 else None
    return fields


def _header(pairs: Pairs, name: bytes) -> bytes:
    return next((value for key, value in reversed(pairs) if key.lower() == name), b"")


def _text(data: bytes, content_type: bytes) -> str | None:
    found = _CHARSET.search(content_type)
    for charset in (found.group(1).decode("ascii") if found else "utf-8", "utf-8"):
        try:
            return charsets.decode(data, charset)
        except LookupError:
            continue  # none that is known: it may be UTF-8 all the same
        except UnicodeDecodeError:
            return None
    return None


def _decompress(data: bytes, coding: str) -> bytes | None:
    """None when it cannot be done whole within the limit."""
    if not data:
        return data
    try:
        if coding in ("gzip", "x-gzip"):
            return _inflate(data, zlib.MAX_WBITS | 16)
        if coding == "deflate":
            return _inflate(data, zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS)
        if coding == "zstd":
            with zstandard.ZstdDecompressor(max_window_size=_DECODED_LIMIT).stream_reader(data) as reader:
                plain = reader.read(_DECODED_LIMIT + 1)
            return plain if len(plain) <= _DECODED_LIMIT else None
    except (zlib.error, zstandard.ZstdError):
        return None
    return None


def _inflate(data: bytes, window: int) -> bytes | None:
    inflater = zlib.decompressobj(window)
    plain = inflater.decompress(data, _DECODED_LIMIT)
    return plain if inflater.eof else None
