"""Text views of what came as bytes: readable, searchable, and marked where they are not the bytes themselves."""

import msgspec

from megido_shared import events

KEY_BYTES = 1000
"""Longest text in an indexed column: a btree entry holds at most 2,704 bytes."""

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_UNREADABLE = [f"%{n:02X}" for n in range(256)]


def plain(text: str) -> str:
    """Without NUL, which Postgres' text refuses."""
    return text.replace("\0", "") if "\0" in text else text


def key(text: str) -> str:
    """`plain`, and short enough for an index."""
    text = plain(text)
    if len(text) * 4 > KEY_BYTES and len(raw := text.encode()) > KEY_BYTES:
        return raw[:KEY_BYTES].decode(errors="ignore")
    return text


def percent(raw: bytes) -> str:
    """UTF-8 where it is valid; NUL and every byte that is not as %XX."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        # surrogateescape maps the byte 0xNN to U+DCNN
        text = "".join(
            _UNREADABLE[ord(c) - 0xDC00] if "\udc80" <= c <= "\udcff" else c
            for c in raw.decode(errors="surrogateescape")
        )
    return text.replace("\0", "%00") if "\0" in text else text


def origin_of(scheme: str, host: str, port: int) -> str:
    """Scheme, host and port (left out when it is the scheme's own) as a URL begins."""
    shown = plain(host)
    if ":" in shown:
        shown = f"[{shown}]"
    return f"{plain(scheme)}://{shown}" + ("" if _DEFAULT_PORTS.get(scheme) == port else f":{port}")


def url_of(request: events.Request) -> str:
    """The URL as a person reads it. `request.target` has the bytes."""
    return origin_of(request.scheme, request.host, request.port) + percent(request.target)


def header(packed: msgspec.Raw, name: bytes) -> bytes:
    """The last value of a header, b"" without one. `name` in lower case. Raises msgspec.DecodeError."""
    length = len(name)
    for found, value in reversed(events.unpack_headers(packed)):
        if len(found) == length and found.lower() == name:
            return value
    return b""


def media_type(content_type: bytes) -> str:
    """Lower case, without parameters."""
    return percent(content_type).partition(";")[0].strip().lower()
