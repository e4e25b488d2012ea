"""The layout for high rates: `<kind>/<day>/<hour>.ndjson`, one entry a line, by the entry's own time (UTC).

Exactly once: before a round first writes to a file, the file's size is noted in `.ndjson-round` with the reader's
position in the feed before and after the round. The position itself is committed in Postgres once the round is written.
A start compares the two: a round that was not committed is taken back by cutting its files to what they were, its torn
last line with it, and is then written again. (Against a power cut nothing here is synced: Postgres is the truth.)
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import msgspec

from megido_ingest.jsonlogs.entries import Entry
from megido_shared.logfiles import folders
from megido_shared.logfiles.folders import Folders

ROUND = ".ndjson-round"
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_OPEN = 32
_MOST_NAMES = 100
_FLUSH_BYTES = 1 << 20


class _Round(msgspec.Struct):
    position: int
    last: int
    sizes: dict[str, int]


class _File(NamedTuple):
    name: str
    descriptor: int


class HourlyLines:
    """Writes below `root`, in the folder `inside` of it. Not for two threads at once, nor for two processes below one
    root."""

    keeps_every_state = False

    def __init__(self, root: Path, inside: str = "") -> None:
        self.root = root
        self._inside = f"{inside}/" if inside else ""
        self._folders = Folders(root)
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._waiting: dict[str, bytearray] = {}
        self._round: _Round | None = None
        self._note = -1

    def resume(self, position: int) -> None:
        self.close()
        try:
            found = folders.read_file(self._folders.get(), ROUND)
        except FileNotFoundError:
            return
        if found is None:
            return
        noted = _decoded(found)
        if noted is not None and noted.position == position:
            for path, size in noted.sizes.items():
                self._cut(path, size)
        self._tell(None)

    def begin(self, position: int, last: int) -> None:
        self._waiting.clear()
        self._round = _Round(position, last, {})

    def write(self, entry: Entry) -> None:
        path = self._inside + _path(entry)
        lines = self._waiting.setdefault(path, bytearray())
        lines += msgspec.json.encode(entry.fields)
        lines += b"\n"
        if len(lines) > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        assert self._round is not None
        opened = [(self._opened(path), lines) for path, lines in self._waiting.items() if lines]
        fresh = [file for file, _ in opened if file.name not in self._round.sizes]
        for file in fresh:
            self._round.sizes[file.name] = os.fstat(file.descriptor).st_size
        if fresh:
            self._tell(self._round)
        for file, lines in opened:
            _append(file, lines)
        self._waiting.clear()

    def committed(self) -> None:
        if self._round is not None and self._round.sizes:
            self._tell(None)
        self._round = None

    def folder_of(self, kind: str, prefix: str) -> str | None:
        return None  # connections have no folders here

    def make(self, folder: str) -> None:
        self._folders.get((self._inside + folder).strip("/"), create=True)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1].descriptor)
        if self._note >= 0:
            os.close(self._note)
            self._note = -1
        self._folders.close()
        self._waiting.clear()
        self._round = None

    def __del__(self) -> None:
        self.close()

    def _opened(self, path: str) -> _File:
        found = self._files.get(path)
        if found is not None:
            if os.fstat(found.descriptor).st_nlink == 1:
                self._files.move_to_end(path)
                return found
            # Somebody tidied up, or gave it a second name.
            os.close(self._files.pop(path).descriptor)
            self._folders.close()
        found = self._open(path)
        _mend(found)
        self._files[path] = found
        while len(self._files) > _MOST_OPEN:
            os.close(self._files.popitem(last=False)[1].descriptor)
        return found

    def _open(self, path: str) -> _File:
        """The file, or the next of its names that is no link, device or somebody's."""
        above, _, stem = path.rpartition("/")
        folder = self._folders.get(above, create=True)
        for number in range(_MOST_NAMES):
            name = f"{stem}-{number}.ndjson" if number else f"{stem}.ndjson"
            descriptor = _open_ours(folder, name)
            if descriptor is not None:
                return _File(f"{above}/{name}", descriptor)
        raise OSError(f"no name is left for lines of {path} in {self.root}")

    def _cut(self, path: str, size: int) -> None:
        above, _, name = path.rpartition("/")
        try:
            folder = self._folders.get(above)
        except OSError:  # somebody tidied up
            return
        descriptor = _open_ours(folder, name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor is None:
            return
        try:
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)

    def _tell(self, noted: _Round | None) -> None:
        """In one write: a kill leaves the former note or this one. Nothing is noted of a committed round."""
        if self._note >= 0 and os.fstat(self._note).st_nlink != 1:
            os.close(self._note)
            self._note = -1
        if self._note < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = _open_ours(self._folders.get(create=True), ROUND, flags)
            if descriptor is None:
                raise OSError(f"{self.root / ROUND} is no file of ours")
            self._note = descriptor
        if noted is None:
            os.ftruncate(self._note, 0)
            return
        content = msgspec.json.encode(noted) + b"\n"
        if os.pwrite(self._note, content, 0) != len(content):
            raise OSError(28, "the round could not be noted", str(self.root / ROUND))


def _path(entry: Entry) -> str:
    """`<kind>/<day>/<hour>`, from the entry's own time stamp."""
    stamp = entry.fields["timestamp"]
    return f"{entry.folder.partition('/')[0]}/{stamp[:4]}{stamp[5:7]}{stamp[8:10]}/{stamp[11:13]}"


def _decoded(content: bytes) -> _Round | None:
    """The note's one line; what stands behind it is of a longer one before."""
    try:
        return msgspec.json.decode(content.partition(b"\n")[0], type=_Round)
    except msgspec.DecodeError:
        return None


def _open_ours(folder: int, name: str, flags: int = _APPEND) -> int | None:
    """None where a link, a device, a file with a second name or a folder has the name, or nothing has it and none is
    to be made."""
    try:
        descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in folders.NO_FILE:
            return None
        raise
    if folders.is_ours(os.fstat(descriptor)):
        return descriptor
    os.close(descriptor)
    return None


def _mend(file: _File) -> None:
    """Cuts a torn last line, of whatever wrote it."""
    size = os.fstat(file.descriptor).st_size
    at = size
    while at > 0:
        start = max(0, at - (1 << 16))
        piece = os.pread(file.descriptor, at - start, start)
        if (end := piece.rfind(b"\n")) >= 0:
            at = start + end + 1
            break
        at = start
    if at < size:
        os.ftruncate(file.descriptor, at)


def _append(file: _File, lines: bytearray) -> None:
    """All of it or, on a full disk, none."""
    before = os.fstat(file.descriptor).st_size
    if os.write(file.descriptor, lines) != len(lines):
        os.ftruncate(file.descriptor, before)
        raise OSError(28, "only a part of the lines could be written", file.name)
