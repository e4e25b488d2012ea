"""What the cache holds: responses by URL, the least recently used given up first; bounded in bytes."""

import time
from collections import OrderedDict
from email.utils import formatdate, mktime_tz, parsedate_tz
from uuid import uuid4

import hishel

type Fields = tuple[tuple[bytes, bytes], ...]

CAPACITY = 64 << 20
"""Bytes of all responses together."""

VARIANTS = 8
"""Responses kept of one URL (`Vary`)."""

OVERHEAD = 2048
"""Bytes counted for a response beside its content and header fields: the objects."""

FIELD = 512
"""Bytes counted for a header field beside its text, which is there twice: as it is served, and as hishel sees it."""


class Stored:
    """A response: `fields` as they are served, `content` in its coding, and `entry`, by which hishel judges it."""

    __slots__ = ("content", "entry", "fields", "http_version", "reason", "size")

    def __init__(self, entry: hishel.Entry, fields: Fields, http_version: bytes, reason: bytes, content: bytes) -> None:
        self.entry = entry
        self.fields = fields
        self.http_version = http_version
        self.reason = reason
        self.content = content
        self.size = OVERHEAD + len(content) + len(reason) + 4 * len(entry.request.url) + _size(fields)
        for headers in (entry.request.headers, entry.response.headers if entry.response else ()):
            self.size += sum(len(name) + len(headers[name]) for name in headers)


def _size(fields: Fields) -> int:
    return sum(len(name) + len(value) + FIELD for name, value in fields)


class Store:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.size = 0
        self._found: OrderedDict[str, list[Stored]] = OrderedDict()

    def __contains__(self, url: str) -> bool:
        return url in self._found

    def get(self, url: str) -> list[Stored]:
        """Every variant, newest last."""
        found = self._found.get(url)
        if found is None:
            return []
        self._found.move_to_end(url)
        return list(found)

    def add(self, stored: Stored) -> None:
        """Gives up what was used least recently until it fits. What is larger than everything is not taken."""
        if stored.size > self.capacity:
            return
        url = stored.entry.request.url
        variants = self.get(url)
        for oldest in variants[: -VARIANTS + 1] if len(variants) >= VARIANTS else ():
            self.remove(oldest)
        self._found.setdefault(url, []).append(stored)
        self.size += stored.size
        while self.size > self.capacity:
            _, given_up = self._found.popitem(last=False)
            self.size -= sum(item.size for item in given_up)

    def remove(self, stored: Stored) -> None:
        url = stored.entry.request.url
        kept = [item for item in self._found.get(url, ()) if item is not stored]
        if len(kept) != len(self._found.get(url, ())):
            self.size -= stored.size
        if kept:
            self._found[url] = kept
        else:
            self._found.pop(url, None)


def view(fields: Fields) -> hishel.Headers:
    """Header fields as hishel takes them."""
    found: dict[str, list[str]] = {}
    for name, value in fields:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return hishel.Headers(found)


def dated(fields: Fields, now: float) -> hishel.Headers:
    """A response's fields for hishel, which reckons its age from `Date` alone: that is put where a response that
    came with its `Date`, `Age` or neither must have begun (RFC 9111, 4.2.3; RFC 9110, 6.6.1), `Expires` with it."""
    headers = view(fields)
    date = _seconds(headers.get("date", ""))
    age = headers.get("age", "").strip()
    stated = now if date is None else date
    begun = now - max(0.0, now - stated, float(age) if age.isdigit() and len(age) < 10 else 0.0)
    expires = _seconds(headers.get("expires", ""))
    for name, moment in (("date", begun), ("expires", None if expires is None else expires - (stated - begun))):
        if moment is not None:
            headers.pop(name, None)
            headers[name] = formatdate(int(moment), usegmt=True)
    return headers


def entry(request: hishel.Request, headers: hishel.Headers) -> hishel.Entry:
    return hishel.Entry(uuid4(), request, hishel.Response(200, headers))


def _seconds(date: str) -> float | None:
    try:
        parts = parsedate_tz(date)
        return None if parts is None else float(mktime_tz(parts))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None  # a server may send anything


def now() -> float:
    """The clock that hishel reads."""
    return time.time()
