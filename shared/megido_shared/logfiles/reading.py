"""Reading log files of both layouts: the founding document's `get_recent_logs`."""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from heapq import nlargest
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from megido_shared.logfiles import folders

type Kind = Literal["requests", "responses", "websockets", "errors", "auth"]
KINDS: tuple[Kind, ...] = get_args(Kind.__value__)
GENERAL = "proxy_general.log"

DAY = re.compile(r"\d{8}", re.ASCII)
LINES = re.compile(r"([01]\d|2[0-3])(-\d{1,2})?\.ndjson", re.ASCII)
"""A file of the hourly layout; its first group is the hour."""
_HOUR = re.compile(r"([01]\d|2[0-3])\d{4}_.*\.json", re.ASCII)
_PIECE = 1 << 20
_MOST_BYTES = 64 << 20
"""Of one file of lines that is looked through from its end."""

type _Entry = dict[str, Any]


class Budget:
    """Bytes that may still be read. `truncated` once something was cut short: nothing older is read then."""

    def __init__(self, left: int = sys.maxsize - 1) -> None:
        self.left = left
        self.truncated = False

    def take(self, count: int) -> bool:
        if count > self.left:
            self.truncated = True
            return False
        self.left -= count
        return True


def recent(log_root: Path, kind: Kind, limit: int = 100, budget: Budget | None = None) -> list[_Entry]:
    """The newest entries of a kind, newest first. What is being written, and what is no whole entry, is left out.
    `budget` says afterwards whether it was reached. Raises ValueError on another kind, OSError on a root that
    cannot be read; one that is not there has no entries."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of log; there are {', '.join(KINDS)}")
    try:
        root = folders.open_root(log_root)
    except FileNotFoundError:
        return []
    try:
        with folders.opened(root, kind) as base:
            return [] if base is None else _recent(base, kind, max(0, limit), budget or Budget())
    finally:
        os.close(root)


def general(log_root: Path, limit: int = 100) -> list[str]:
    """The last lines of `proxy_general.log`, newest first. Raises OSError."""
    try:
        root = folders.open_root(log_root)
    except FileNotFoundError:
        return []
    try:
        content = folders.read_file(root, GENERAL, most=max(0, limit) * 2100) or b""
    finally:
        os.close(root)
    lines = content.decode(errors="replace").split("\n")[:-1]
    return lines[::-1][:limit]


def hour_of(name: str) -> str | None:
    """Of a file in a day's folder; None for one that is not ours."""
    found = LINES.fullmatch(name) or _HOUR.fullmatch(name)
    return found[1] if found else None


def _recent(base: int, kind: Kind, limit: int, budget: Budget) -> list[_Entry]:
    found: list[_Entry] = []
    if kind == "websockets":
        found += _connections(base, limit, budget)
    by_time = _by_days(base, limit, budget)
    found += by_time
    return nlargest(limit, found, key=_moment) if kind == "websockets" else found[:limit]


def _by_days(base: int, limit: int, budget: Budget) -> list[_Entry]:
    found: list[_Entry] = []
    for day in sorted((name for name in folders.folders_in(base) if DAY.fullmatch(name)), reverse=True):
        with folders.opened(base, day) as folder:
            for entries in () if folder is None else _by_hours(folder, limit, budget):
                found += entries
                if len(found) >= limit or budget.truncated:
                    return found[:limit]
    return found


def _by_hours(folder: int, limit: int, budget: Budget) -> Iterator[list[_Entry]]:
    """An hour's newest, newest first, hour by hour from the last one."""
    hours: dict[str, list[str]] = defaultdict(list)
    for name in folders.names(folder):
        if hour := hour_of(name):
            hours[hour].append(name)
    for hour in sorted(hours, reverse=True):
        found: list[_Entry] = []
        singles = 0
        for name in sorted(hours[hour], reverse=True):
            if budget.truncated:
                break
            if LINES.fullmatch(name):
                found += _last_lines(folder, name, limit, budget)
            elif singles < limit and (entry := _single(folder, name, budget)) is not None:
                found.append(entry)
                singles += 1
        yield nlargest(limit, found, key=_moment)


def _last_lines(folder: int, name: str, limit: int, budget: Budget) -> list[_Entry]:
    """Whole lines from a file's end, read in pieces backwards."""
    descriptor = folders.open_file(folder, name)
    if descriptor is None:
        return []
    found: list[_Entry] = []
    with os.fdopen(descriptor, "rb") as file:
        at = file.seek(0, os.SEEK_END)
        least = max(0, at - _MOST_BYTES)
        rest = b""
        torn = True  # what stands behind the last line end is no line
        while at > least and len(found) < limit:
            start = max(least, at - _PIECE)
            if not budget.take(at - start):
                break
            file.seek(start)
            lines = (file.read(at - start) + rest).split(b"\n")
            at, rest = start, lines[0]
            if torn and len(lines) == 1:
                continue
            for line in reversed(lines[1:-1] if torn else lines[1:]):
                if (entry := _entry(line)) is not None:
                    found.append(entry)
            torn = False
        budget.truncated |= 0 < at == least and len(found) < limit
        if at == 0 and not torn and (entry := _entry(rest)) is not None:
            found.append(entry)
    return found[:limit]


def _connections(base: int, limit: int, budget: Budget) -> list[_Entry]:
    """Of the tree's folders by connection, whose names hold no date: the newest written."""

    def files() -> Iterator[tuple[int, str, str]]:
        for name in folders.folders_in(base):
            with folders.opened(base, name) as folder:
                if folder is None or DAY.fullmatch(name):
                    continue
                for file in folders.names(folder):
                    if hour_of(file) and not LINES.fullmatch(file):
                        yield _written(folder, file), name, file

    found: list[_Entry] = []
    for _, name, file in nlargest(limit, files()):
        with folders.opened(base, name) as folder:
            if budget.truncated:
                break
            if folder is not None and (entry := _single(folder, file, budget)) is not None:
                found.append(entry)
    return found


def _single(folder: int, name: str, budget: Budget) -> _Entry | None:
    content = folders.read_file(folder, name, most=budget.left + 1)
    return _entry(content) if content is not None and budget.take(len(content)) else None


def _written(folder: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns
    except FileNotFoundError:
        return 0


def _entry(content: bytes | None) -> _Entry | None:
    try:
        found = msgspec.json.decode(content or b"")
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _moment(entry: _Entry) -> str:
    return str(entry.get("timestamp", ""))
