"""`proxy_general.log`: one line for what happens around the traffic. Nodes that start and stop, errors, refused
clients, WebSocket connections that open and close.

A line ends with `[key]`, which names the event that it is about. A start reads the file's end and leaves out
lines whose keys are there, so what is read from the feed a second time is not logged a second time.
"""

import errno
import os
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Row

from megido_ingest.jsonlogs.entries import stamp
from megido_shared.logfiles import folders
from megido_shared.logfiles.folders import Folders
from megido_shared.logfiles.reading import GENERAL

OLDER = f"{GENERAL}.1"
LARGEST = 32 << 20
"""Bytes that the file has when it becomes `OLDER`, in whose place it comes."""
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_REMEMBERED = 20_000
_TAIL = 4 << 20
_KEY = re.compile(rb"\[([^\[\]\s]+)\]$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 2000


@dataclass(frozen=True, slots=True)
class Line:
    moment: datetime
    level: str
    text: str
    key: str

    def render(self) -> bytes:
        return f"{stamp(self.moment)} {self.level} {one_line(self.text)} [{self.key}]\n".encode()


def one_line(text: str) -> str:
    """Control characters escaped: a line of traffic cannot pass for a line of ours."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)[:_LONGEST]


def error_line(row: Row[Any]) -> Line | None:
    """None for the projection of a refused credential, which has its own line."""
    if row.error_type == "AUTH_FAILURE" and row.seq == 0:
        return None
    text = f"{row.error_type} {row.url or '-'} from {row.source_ip or '-'}: {row.error_message}"
    return Line(row.occurred_at, "ERROR", text, f"error:{row.error_id.hex}")


def auth_line(row: Row[Any]) -> Line | None:
    if row.success:
        return None
    text = f"authentication failed from {row.source_ip or '-'} as {row.username or '-'}: {row.failure_reason}"
    return Line(row.occurred_at, "WARNING", text, f"auth:{row.auth_id.hex}")


def opened_line(row: Row[Any]) -> Line | None:
    """Of a flow: the line of a WebSocket connection's handshake."""
    if row.status != 101 or row.protocol not in ("WS", "WSS"):
        return None
    text = f"WebSocket opened {row.url} from {row.source_ip or '-'}"
    return Line(row.started_at, "INFO", text, f"open:{row.flow_id.hex}")


def closed_line(row: Row[Any]) -> Line | None:
    """Of a WebSocket message. Both sides send a CLOSE; the first one's line is the connection's."""
    if row.message_type != "CLOSE":
        return None
    by = "client" if row.direction == "SEND" else "server"
    text = f"WebSocket closed {row.url} by {by}, code {row.close_code}, {row.close_reason or 'no reason given'}"
    return Line(row.occurred_at, "INFO", text, f"close:{row.connection_id}")


def node_lines(row: Row[Any]) -> list[Line]:
    """A node keeps its epoch when it starts again: a start is known by the epoch and its time."""
    what = f"{row.service} {row.node}" + (f" listening on {row.listen}" if row.listen else "")
    began = row.started_at or row.seen_at
    start = f"{row.epoch.hex}:{began:%Y%m%d%H%M%S%f}" if row.started_at else row.epoch.hex
    lines = [Line(began, "INFO", f"{what} started, version {row.version or '-'}", f"started:{start}")]
    if row.state == "stopping":
        lines.append(Line(row.seen_at, "INFO", f"{what} stopped", f"stopped:{start}"))
    return lines


class GeneralLog:
    """Appends to `proxy_general.log` in the folder `inside` of a log root. Raises OSError."""

    def __init__(self, root: Path, inside: str = "") -> None:
        self._root = root
        self._folders = Folders(root)
        self._inside = inside
        self._order: deque[str] = deque()
        self._keys: set[str] = set()
        self._read = False

    def append(self, lines: Iterable[Line | None]) -> None:
        """Those whose keys were not logged before, in one write."""
        folder = self._folders.get(self._inside, create=True)
        if not self._read:
            self._remember_tail(folder)
            self._read = True
        fresh: dict[str, Line] = {}
        for line in lines:
            if line is not None and line.key not in self._keys:
                fresh.setdefault(line.key, line)
        if not fresh:
            return
        self._write(folder, b"".join(line.render() for line in fresh.values()))
        for key in fresh:
            self._remember(key)

    def _write(self, folder: int, content: bytes) -> None:
        descriptor = os.open(GENERAL, _APPEND, 0o600, dir_fd=folder)
        try:
            facts = os.fstat(descriptor)
            if not folders.is_ours(facts):
                raise OSError(errno.EPERM, "is no file of its own, and is not written into", GENERAL)
            _end_torn_line(descriptor, facts.st_size)
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, content) != len(content):  # a full disk: all of it again later
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, "only a part of the lines could be written", GENERAL)
        finally:
            os.close(descriptor)
        if before > LARGEST:
            os.replace(GENERAL, OLDER, src_dir_fd=folder, dst_dir_fd=folder)

    def _remember_tail(self, folder: int) -> None:
        for name in (OLDER, GENERAL):
            for line in (folders.read_file(folder, name, most=_TAIL) or b"").splitlines():
                if found := _KEY.search(line):
                    self._remember(found.group(1).decode(errors="replace"))

    def _remember(self, key: str) -> None:
        if key in self._keys:
            return
        self._keys.add(key)
        self._order.append(key)
        if len(self._order) > _REMEMBERED:
            self._keys.discard(self._order.popleft())


def _end_torn_line(descriptor: int, size: int) -> None:
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
