"""The text of a body, as it is searched: what a body term of a filter means, in SQL and in memory alike."""

import importlib.util
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import zstandard

from megido_shared import charsets

LIMIT = 256 << 10
"""Bytes of the decoded body that are looked at."""

_WINDOW_LIMIT = 8 << 20
_TEXTUAL = ("text/", "json", "xml", "javascript", "ecmascript", "x-www-form-urlencoded", "graphql", "yaml")
_MOSTLY = 0.02
"""Share of control characters from which on what decodes is taken for binary data all the same."""
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 27), *range(28, 32), 127, 0xFFFD])


class BodyText(NamedTuple):
    """`lossy`: the text is not the whole body, or not exactly it."""

    text: str
    lossy: bool


NOTHING = BodyText("", False)
_BINARY = BodyText("", True)


def body_text(data: bytes, headers: Sequence[tuple[bytes, bytes]], *, truncated: bool = False) -> BodyText:
    """The content coding undone and the charset applied, over the first `LIMIT` bytes, NUL left out; "" of data that
    is no text. `truncated`: `data` is less than the body was."""
    if not data:
        return BodyText("", truncated)
    plain, cut = _decoded(data, _last(headers, b"content-encoding").strip().lower())
    if plain is None:
        return _BINARY
    content_type = _last(headers, b"content-type").decode("latin-1").lower()
    text, exact = _characters(plain, content_type, cut=cut or truncated)
    if text is None:
        return _BINARY
    if "\0" in text:
        text, exact = text.replace("\0", ""), False
    return BodyText(text, cut or truncated or not exact)


def _decoded(data: bytes, coding: bytes) -> tuple[bytes | None, bool]:
    """At most `LIMIT` bytes, and whether there were more or the rest is broken; None for a coding that is not known."""
    if coding in (b"", b"identity"):
        return data[:LIMIT], len(data) > LIMIT
    undo = _CODINGS.get(coding)
    if undo is None:
        return None, True
    try:
        plain, whole = undo(data)
    except (zlib.error, zstandard.ZstdError, _BROTLI_ERROR, EOFError):
        return None, True
    return plain[:LIMIT], not whole or len(plain) > LIMIT


def _characters(plain: bytes, content_type: str, *, cut: bool) -> tuple[str | None, bool]:
    """The text, and whether it is exact; None for binary data. A cut one may end within a character."""
    charset = _parameter(content_type, "charset") or "utf-8"
    for name in dict.fromkeys((charset, "utf-8")):
        for tail in range(4 if cut else 1):
            try:
                text = charsets.decode(plain[: len(plain) - tail], name)
                text.encode()  # some charsets can name lone surrogates, which no database holds
            except LookupError:
                break
            except ValueError:
                continue
            return (text, name == charset) if _is_text(text) else (None, False)
    if any(word in content_type for word in _TEXTUAL):
        return plain.decode("utf-8", "replace"), False
    return None, False


def _is_text(text: str) -> bool:
    sample = text[:4096]
    return len(sample) - len(sample.translate(_CONTROLS)) <= _MOSTLY * len(sample)


def _parameter(content_type: str, wanted: str) -> str:
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip() == wanted:
            return value.strip().strip("\"'")
    return ""


def _last(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    return next((value for key, value in reversed(headers) if key.lower() == name), b"")


def _inflate(data: bytes, window: int) -> tuple[bytes, bool]:
    inflater = zlib.decompressobj(window)
    return inflater.decompress(data, LIMIT + 1), inflater.eof


def _deflate(data: bytes) -> tuple[bytes, bool]:
    return _inflate(data, zlib.MAX_WBITS if data[0] & 0x0F == 8 else -zlib.MAX_WBITS)


def _zstd(data: bytes) -> tuple[bytes, bool]:
    with zstandard.ZstdDecompressor(max_window_size=_WINDOW_LIMIT).stream_reader(data) as reader:
        plain = reader.read(LIMIT + 1)
    return plain, len(plain) <= LIMIT


_CODINGS: dict[bytes, Callable[[bytes], tuple[bytes, bool]]] = {
    b"gzip": lambda data: _inflate(data, zlib.MAX_WBITS | 16),
    b"x-gzip": lambda data: _inflate(data, zlib.MAX_WBITS | 16),
    b"deflate": _deflate,
    b"zstd": _zstd,
}
_BROTLI_ERROR: type[Exception] = zlib.error

if importlib.util.find_spec("brotli"):  # comes with mitmproxy
    _brotli: Any = importlib.import_module("brotli")
    _BROTLI_ERROR = _brotli.error

    def _unbrotli(data: bytes) -> tuple[bytes, bool]:
        decoder = _brotli.Decompressor()
        plain = bytes(decoder.process(data, output_buffer_limit=LIMIT + 1))
        return plain, bool(decoder.is_finished())

    _CODINGS[b"br"] = _unbrotli
