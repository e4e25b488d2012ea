"""The beginning of a stored payload, as a list shows it. Pure."""

import zstandard

from megido_shared.db import codecs

PREVIEW_CHARACTERS = 200
_PREVIEW_BYTES = PREVIEW_CHARACTERS * 4 + 4


def preview(stored: bytes, message_type: str) -> str:
    """200 characters, then `...`, of a payload as `codecs.pack` stored it, or of the beginning of one.

    Text is text; BINARY is hex, and so is a PING or PONG that is no text.
    """
    data = _beginning(stored)
    text = _text(data, message_type)
    return text if len(text) <= PREVIEW_CHARACTERS else text[:PREVIEW_CHARACTERS] + "..."


def _text(data: bytes, message_type: str) -> str:
    if message_type == "BINARY":
        return data.hex()
    if message_type == "TEXT":
        return data.decode("utf-8", "replace")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.hex()


def _beginning(stored: bytes) -> bytes:
    """Enough bytes for the preview; raises ValueError on an unknown coding byte."""
    if not stored:
        return b""
    if stored[0] == codecs.RAW:
        return stored[1 : 1 + _PREVIEW_BYTES]
    if stored[0] == codecs.ZSTD:
        with zstandard.ZstdDecompressor().stream_reader(stored[1:]) as reader:
            return reader.read(_PREVIEW_BYTES)
    raise ValueError(f"unknown coding {stored[0]} of a stored value")
