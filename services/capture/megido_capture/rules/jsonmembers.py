"""Putting members into a JSON object without writing the rest of it anew: a payload must not change what it does not
name, and a parser's answer to 1e400, 0.10 or a name given twice is what is being tested."""

import re
from collections.abc import Iterator, Mapping

import msgspec

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
_SCALAR = re.compile(rb"[^\s,}]++")
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]')
_BETWEEN = re.compile(rb"[\s:,]*+")


class NoObject(Exception):
    """The text is no JSON object."""


def put_members(text: bytes, members: Mapping[str, str]) -> bytes:
    """`text` with each of `members` set to a string; nothing counts as `{}`. A member that is there, under whatever
    escapes and however often, gets its new value where it stands; another is appended. Every other byte stays: numbers,
    escapes, white space, order, names given twice. Raises NoObject."""
    text = text if text.strip() else b"{}"
    try:
        known = _decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise NoObject(str(error)) from error
    edits: list[bytes] = []
    at = 0
    if not known.keys().isdisjoint(members):
        for name, start, end in _spans(text):
            if name in members:
                edits += (text[at:start], msgspec.json.encode(members[name]))
                at = end
    close = text.rindex(b"}")
    added = [_member(name, payload) for name, payload in members.items() if name not in known]
    if added:
        tail = text[at:close].rstrip()  # white space before the brace goes behind what is appended
        edits += (tail, b"," if known else b"", b",".join(added))
        at += len(tail)
    return b"".join((*edits, text[at:]))


def _member(name: str, payload: str) -> bytes:
    return msgspec.json.encode(name) + b":" + msgspec.json.encode(payload)


def _spans(text: bytes) -> Iterator[tuple[str, int, int]]:
    """Name of each member of a valid object, where its value begins and where it ends."""
    at = text.index(b"{") + 1
    while (name := _STRING.match(text, _after(text, at))) is not None:
        start = _after(text, name.end())
        at = _end(text, start)
        raw = name.group()
        yield msgspec.json.decode(raw, type=str) if b"\\" in raw else raw[1:-1].decode(), start, at


def _after(text: bytes, at: int) -> int:
    found = _BETWEEN.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()


def _end(text: bytes, start: int) -> int:
    """Where the value that begins at `start` ends."""
    first = text[start]
    if first not in b"[{":
        found = (_STRING if first == 0x22 else _SCALAR).match(text, start)
        assert found is not None  # the text is valid
        return found.end()
    depth = 0
    for token in _TOKEN.finditer(text, start):
        mark = token.group()
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
            if depth == 0:
                return token.end()
    raise NoObject("a value has no end")
