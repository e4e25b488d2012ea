"""`proxy_general.log`: one line for what happens around the traffic. Nodes that start and stop, errors, refused
clients, WebSocket connections that open and close.

A line ends with `[key]`, which names the event that it is about. A start reads the file's end and leaves out
lines whose keys are there, so what is read from the feed a second time is not logged a second time.
"""

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

FILE = "proxy_general.log"
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
    """Appends to `<root>/proxy_general.log`. Raises OSError."""

    def __init__(self, root: Path) -> None:
        self._path = root / FILE
        self._order: deque[str] = deque()
        self._keys: set[str] = set()
        self._read = False

    def append(self, lines: Iterable[Line | None]) -> None:
        """Those whose keys were not logged before, in one write."""
        if not self._read:
            self._remember_tail()
            self._read = True
        fresh: dict[str, Line] = {}
        for line in lines:
            if line is not None and line.key not in self._keys:
                fresh.setdefault(line.key, line)
        if not fresh:
            return
        content = b"".join(line.render() for line in fresh.values())
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, content) != len(content):  # a full disk: all of it again later
                os.ftruncate(descriptor, before)
                raise OSError(28, "only a part of the lines could be written", str(self._path))
        finally:
            os.close(descriptor)
        for key in fresh:
            self._remember(key)

    def _remember_tail(self) -> None:
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                for line in file:
                    if found := _KEY.search(line.rstrip(b"\n")):
                        self._remember(found.group(1).decode(errors="replace"))
        except FileNotFoundError:
            return
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        with self._path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def _remember(self, key: str) -> None:
        if key in self._keys:
            return
        self._keys.add(key)
        self._order.append(key)
        if len(self._order) > _REMEMBERED:
            self._keys.discard(self._order.popleft())
