"""Reading and tidying a log tree: the founding document's `get_recent_logs` and `cleanup_old_logs`."""

import heapq
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec

type Kind = Literal["requests", "responses", "websockets", "errors", "auth"]
KINDS: tuple[Kind, ...] = ("requests", "responses", "websockets", "errors", "auth")


def recent(log_root: Path, kind: Kind, limit: int = 100) -> list[dict[str, Any]]:
    """The newest entries of a kind, newest first. A file that is being written is left out."""
    entries: list[dict[str, Any]] = []
    for path in _newest_first(log_root / kind, kind, limit):
        try:
            found = msgspec.json.decode(path.read_bytes())
        except (FileNotFoundError, msgspec.DecodeError):
            continue
        entries.append(found)
        if len(entries) >= limit:
            break
    return entries


def cleanup(log_root: Path, days: int) -> int:
    """Removes the files of days that ended more than `days` days ago, and folders that are empty then. Returns
    how many files went. WebSocket folders go by when their files were written: a connection may last for days."""
    oldest = datetime.now(UTC) - timedelta(days=days)
    removed = 0
    for kind in KINDS:
        for folder in _folders(log_root / kind):
            if kind == "websockets":
                removed += _remove(folder, before=time.time() - days * 86_400)
            elif folder.name < oldest.strftime("%Y%m%d"):
                removed += _remove(folder, before=float("inf"))
    return removed


def _newest_first(base: Path, kind: Kind, limit: int) -> Iterator[Path]:
    if kind == "websockets":
        # Names hold no date: the newest written first.
        files = (entry for folder in _folders(base) for entry in _files(folder))
        yield from heapq.nlargest(limit * 2, files, key=lambda path: (path.stat().st_mtime_ns, path.name))
        return
    for folder in sorted(_folders(base), reverse=True):
        yield from sorted(_files(folder), reverse=True)


def _folders(base: Path) -> list[Path]:
    if not base.is_dir():
        return []
    return [path for path in base.iterdir() if path.is_dir() and not path.is_symlink()]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]


def _remove(folder: Path, *, before: float) -> int:
    removed = 0
    for path in folder.iterdir():
        if path.lstat().st_mtime < before and path.suffix in (".json", ".new"):
            path.unlink(missing_ok=True)
            removed += path.suffix == ".json"
    if not any(folder.iterdir()):
        folder.rmdir()
    return removed
