"""Segment files and the records in them: names, the codec, and the parser that survives damage.

A segment is `<topic>.<base>.<seq>.<epoch>.log` in its slot's directory. `base` is the offset of its first byte
(the next segment's base is this one's plus its size, a torn tail included), `seq` the node's count of terminal
records when it was begun, `epoch` the slot's identity. There is no file header that damage could take away.

A record, integers little-endian:

    marker  8   blake2b of the file's name, so that no captured body holds it by chance
    crc     4   crc32c of everything after it
    length  4   bytes after this field
    seq     8   of a terminal record, else 0
    key     2   its length
    key, value
"""

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import google_crc32c

MAX_VALUE_BYTES = 16 << 20
"""Greater than anything that a bus may carry; a length beyond it is damage."""
MAX_KEY_BYTES = 0xFFFF

TOPIC = re.compile(r"[A-Za-z0-9._-]{1,120}")
"""Kafka's alphabet of topic names, short enough for a file name."""

_FRONT = struct.Struct("<8sI")
_BODY = struct.Struct("<IQH")
_WHOLE = struct.Struct("<8sIIQH")
_AFTER_LENGTH = _BODY.size - 4
_PREFIX = _WHOLE.size - _AFTER_LENGTH
OVERHEAD = _WHOLE.size
_MAX_LENGTH = _AFTER_LENGTH + MAX_KEY_BYTES + MAX_VALUE_BYTES

_crc = google_crc32c.value
_extend_crc = google_crc32c.extend


@dataclass(frozen=True)
class Name:
    """What a segment's file name says."""

    topic: str
    base: int
    seq: int
    epoch: str

    @cached_property
    def file(self) -> str:
        return f"{self.topic}.{self.base:020d}.{self.seq:020d}.{self.epoch}.log"

    @cached_property
    def marker(self) -> bytes:
        return hashlib.blake2b(self.file.encode(), digest_size=8).digest()

    @staticmethod
    def parse(file: str) -> "Name | None":
        """None for any other file."""
        parts = file.rsplit(".", 4)
        if len(parts) != 5 or parts[4] != "log" or not TOPIC.fullmatch(parts[0]):
            return None
        try:
            return Name(parts[0], int(parts[1]), int(parts[2]), bytes.fromhex(parts[3]).hex())
        except ValueError:
            return None


def list_segments(slot: Path) -> dict[str, list[Name]]:
    """The segments of a slot by topic, oldest first. Empty for a slot that is not there."""
    try:
        files = os.listdir(slot)  # noqa: PTH208 - names are all that is needed, and this runs often
    except FileNotFoundError:
        return {}
    found: dict[str, list[Name]] = {}
    for file in files:
        if name := Name.parse(file):
            found.setdefault(name.topic, []).append(name)
    for names in found.values():
        names.sort(key=lambda name: (name.base, name.seq))
    return found


def pack(marker: bytes, key: bytes, value: bytes, seq: int) -> bytes:
    """One record as the bytes of one write."""
    head = _BODY.pack(_AFTER_LENGTH + len(key) + len(value), seq, len(key)) + key
    return b"".join((_FRONT.pack(marker, _extend_crc(_crc(head), value)), head, value))


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole, valid record at `[start, end)` of the parsed bytes."""

    start: int
    end: int
    seq: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes `[start, end)` that hold no valid record."""

    start: int
    end: int
    kind: Literal["corrupt", "torn"]


def parse_one(data: bytes, at: int, marker: bytes) -> Entry | None:
    """The record that begins at `at`, or None when it is damaged or not all there."""
    if len(data) - at < OVERHEAD:
        return None
    found, crc, length, seq, key_length = _WHOLE.unpack_from(data, at)
    end = at + _PREFIX + length
    if found != marker or end > len(data) or length < _AFTER_LENGTH + key_length:
        return None
    if _crc(data[at + _FRONT.size : end]) != crc:
        return None
    key_at = at + OVERHEAD
    return Entry(at, end, seq, data[key_at : key_at + key_length], data[key_at + key_length : end])


def wanted_bytes(data: bytes, at: int, marker: bytes) -> int:
    """How many bytes the record at `at` claims to have; 0 when that cannot be believed."""
    if len(data) - at < OVERHEAD:
        return 0
    found, _, length, _, _ = _WHOLE.unpack_from(data, at)
    return _PREFIX + length if found == marker and length <= _MAX_LENGTH else 0


def next_boundary(data: bytes, at: int, marker: bytes, *, live: bool) -> int:
    """Where the damaged record at `at` ends: at the next marker, or -1 when there is none.

    In a segment that is still written (`live`) only a whole valid record further on proves that the bytes at
    `at` are damaged and not just on their way.
    """
    first = data.find(marker, at + 1)
    if not live:
        return first
    hit = first
    while hit >= 0:
        if parse_one(data, hit, marker):
            return first
        hit = data.find(marker, hit + 1)
    return -1


def is_complete(data: bytes, at: int, marker: bytes) -> bool:
    """Whether the record at `at` is all there though damaged (no write of it can still be under way)."""
    wanted = wanted_bytes(data, at, marker)
    return bool(wanted) and at + wanted <= len(data)


def classify_tail(data: bytes, at: int, marker: bytes) -> Literal["corrupt", "torn"]:
    """What the last, invalid bytes of a finished segment are.

    Torn is the beginning of a record whose writer died. The rest is damage to a record that had been written
    whole: a broken marker or body, or a broken length (the checksum fits the length that the file implies).
    """
    rest = data[at:]
    if not rest.startswith(marker[: len(rest)]):
        return "corrupt"
    if len(rest) < OVERHEAD:
        return "torn"
    if is_complete(data, at, marker):
        return "corrupt"
    implied = struct.pack("<I", len(rest) - _PREFIX)
    if _crc(implied + rest[_PREFIX:]) == _WHOLE.unpack_from(rest)[1]:
        return "corrupt"
    return "torn"


def scan(data: bytes, marker: bytes) -> Iterator[Entry | Damage]:
    """Everything in a finished segment, in order."""
    at = 0
    while at < len(data):
        if entry := parse_one(data, at, marker):
            yield entry
            at = entry.end
            continue
        end = next_boundary(data, at, marker, live=False)
        if end < 0:
            yield Damage(at, len(data), classify_tail(data, at, marker))
            return
        yield Damage(at, end, "corrupt")
        at = end
