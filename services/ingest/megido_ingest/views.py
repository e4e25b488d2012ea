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


def url_of(request: events.Request) -> str:
    """The URL as a person reads it. `request.target` has the bytes."""
    host = plain(request.host)
    if ":" in host:
        host = f"[{host}]"
    port = "" if _DEFAULT_PORTS.get(request.scheme) == request.port else f":{request.port}"
    return f"{request.scheme}://{host}{port}{percent(request.target)}"


def header(pairs: list[tuple[bytes, bytes]], name: bytes) -> str:
    """The last value of a header, "" without one. `name` in lower case."""
    length = len(name)
    for found, value in reversed(pairs):
        if len(found) == length and found.lower() == name:
            return percent(value)
    return ""


def headers_of(packed: msgspec.Raw) -> list[tuple[bytes, bytes]]:
    return events.unpack_headers(packed)


def content_type(pairs: list[tuple[bytes, bytes]]) -> str | None:
    """Of a response: lower case, without parameters."""
    found = header(pairs, b"content-type")
    return found.partition(";")[0].strip().lower() or None
