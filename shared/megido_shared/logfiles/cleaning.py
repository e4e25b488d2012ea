"""Removing log files by age and by size. What a dry run names is what a run removes."""

import errno
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from megido_shared.logfiles import folders
from megido_shared.logfiles.folders import Folders
from megido_shared.logfiles.reading import DAY, KINDS, hour_of

_DEEPEST = 8
SPARED = timedelta(hours=2)
"""What was written so recently is not removed for its size: somebody is looking at it, or writing it."""


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """What goes at once: the files of one hour (UTC, `YYYYMMDDHH`) in a folder. The files of a day's folder have their
    hours in their names; those of a WebSocket connection, which may last for days, go by when they were written."""

    hour: str
    folder: str
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Cleanup:
    """`kept_bytes` is what stays, in blocks on the disk like `bytes`. `skipped`: what could not be read or removed,
    each with its reason."""

    units: tuple[Unit, ...]
    kept_bytes: int
    skipped: tuple[str, ...] = ()

    @property
    def files(self) -> int:
        return sum(unit.files for unit in self.units)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)


def plan(root: Path, *, days: int | None = None, max_bytes: int | None = None, now: datetime | None = None) -> Cleanup:
    """What goes: days (UTC) that ended more than `days` days ago, then the oldest hours until what stays is no more
    than `max_bytes`. None is no limit. A folder that cannot be read is skipped, and told. Raises OSError of the root;
    one that is not there has nothing."""
    now = now or datetime.now(UTC)
    skipped: list[str] = []
    units = sorted(measure(root, skipped))
    left = sum(unit.bytes for unit in units)
    oldest = _day(now, days) if days is not None else ""
    spared = f"{now - SPARED:%Y%m%d%H}"
    gone: list[Unit] = []
    for unit in units:
        large = max_bytes is not None and left > max_bytes and unit.hour < spared
        if large or unit.hour[:8] < oldest:
            gone.append(unit)
            left -= unit.bytes
    return Cleanup(tuple(gone), left, tuple(skipped))


def remove(root: Path, units: Collection[Unit]) -> Cleanup:
    """Removes them; answers what went, and what would not. Two at once, and a kill in between, are fine."""
    gone: list[Unit] = []
    skipped: list[str] = []
    known = Folders(root)
    try:
        for unit in units:
            try:
                files, size = _remove(known.get(unit.folder), unit)
            except FileNotFoundError:  # somebody was quicker
                continue
            except OSError as error:
                skipped.append(f"{unit.folder}: {error.strerror}")
                continue
            above, _, name = unit.folder.rpartition("/")
            with suppress(OSError):  # something else lies in it
                os.rmdir(name, dir_fd=known.get(above))
            gone.append(Unit(unit.hour, unit.folder, files, size))
    finally:
        known.close()
    return Cleanup(tuple(gone), 0, tuple(skipped))


def cleanup(log_root: Path, days: int) -> int:
    """Removes the files of days that ended more than `days` days ago. Returns how many entries' files went."""
    return remove(log_root, plan(log_root, days=days).units).files


def measure(root: Path, skipped: list[str] | None = None) -> Iterator[Unit]:
    """All that could ever go, in units: in the root and in the folders below it that `log_directory` named. Those that
    cannot be read are told in `skipped`. Raises OSError of the root."""
    skipped = [] if skipped is None else skipped
    known = Folders(root)
    try:
        known.get()
    except FileNotFoundError:
        return
    try:
        for place in _places(known, "", skipped):
            for kind in KINDS:
                with _skipping(f"{place}{kind}", skipped):
                    yield from _of_kind(known, f"{place}{kind}", kind, skipped)
    finally:
        known.close()


def _places(known: Folders, inside: str, skipped: list[str]) -> Iterator[str]:
    """The root, and every folder below it that is not one of a place's own, as `""` or `path/`."""
    yield inside
    if inside.count("/") >= _DEEPEST:
        return
    for name in folders.folders_in(known.get(inside.rstrip("/"))):
        if name not in KINDS:
            with _skipping(f"{inside}{name}", skipped):
                yield from _places(known, f"{inside}{name}/", skipped)


def _of_kind(known: Folders, path: str, kind: str, skipped: list[str]) -> Iterator[Unit]:
    for name in folders.folders_in(known.get(path)):
        if kind == "websockets" or DAY.fullmatch(name):
            with _skipping(f"{path}/{name}", skipped):
                yield from _units(known.get(f"{path}/{name}"), f"{path}/{name}")


@contextmanager
def _skipping(path: str, skipped: list[str]) -> Iterator[None]:
    """One folder does not hold up the others. What is gone, or is no folder, is not told."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            skipped.append(f"{path}: {error.strerror}")


def _day(now: datetime, days: int) -> str:
    """The first day that stays."""
    try:
        return f"{now - timedelta(days=days):%Y%m%d}"
    except OverflowError:
        return ""


def _units(folder: int, path: str) -> Iterator[Unit]:
    hours: dict[str, tuple[int, int]] = {}
    for _, hour, facts, shown in _files(folder, path):
        files, size = hours.get(hour, (0, 0))
        hours[hour] = (files + shown, size + facts.st_blocks * 512)
    for hour, (files, size) in hours.items():
        yield Unit(hour, path, files, size)


def _remove(folder: int, unit: Unit) -> tuple[int, int]:
    files = size = 0
    for name, hour, facts, shown in _files(folder, unit.folder):
        if hour != unit.hour:
            continue
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            continue
        files += shown
        size += facts.st_blocks * 512
    return files, size


def _files(folder: int, path: str) -> Iterator[tuple[str, str, os.stat_result, bool]]:
    """(name, hour, facts, whether it is an entry's) of the files of ours; of nothing else that lies there."""
    day = path.rpartition("/")[2]
    for name in folders.names(folder):
        hour = hour_of(_plain(name))
        facts = _facts(folder, name) if hour else None
        if hour is None or facts is None:
            continue
        written = time.strftime("%Y%m%d%H", time.gmtime(facts.st_mtime))
        yield name, day + hour if DAY.fullmatch(day) else written, facts, not name.startswith(".")


def _plain(name: str) -> str:
    """The name of a file that a kill left beside the one that it was to replace."""
    return name[1:].removesuffix(".new") if name.startswith(".") else name


def _facts(folder: int, name: str) -> os.stat_result | None:
    """Of a file, or of a link in its place: a link is removed, and not what it leads to."""
    try:
        facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return None if stat.S_ISDIR(facts.st_mode) else facts
