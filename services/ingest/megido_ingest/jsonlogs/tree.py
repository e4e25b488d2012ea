"""The founding document's layout, a file an entry: who owns a name, and what a crash may leave behind.

A new file is written without a name and linked into its folder when it is whole (`O_TMPFILE`), so that nobody reads
half of one and a kill leaves nothing behind; it costs what a plain write does, a temporary file and a rename cost
more. Where the file system cannot do that, it is written plainly: a kill may then leave a half file, but the
reader's position in the feed moves on only after a whole batch, so the next start writes everything since then again,
in the same order, and whoever wanted the name first meets the half file first and completes it. A file that exists
is replaced by rename, never written into. (Against a power cut nothing here is synced: Postgres is the truth.)
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from megido_ingest.jsonlogs.entries import Entry
from megido_shared.logfiles import folders
from megido_shared.logfiles.folders import Folders

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMELESS = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
"""What a file system or kernel without O_TMPFILE says."""


class LogTree:
    """Writes below `root`, in the folder `inside` of it. Raises OSError."""

    keeps_every_state = True

    def __init__(self, root: Path, inside: str = "") -> None:
        self.root = root
        self._inside = f"{inside}/" if inside else ""
        self._folders = Folders(root)
        self._nameless = True

    def resume(self, position: int) -> None:
        """Nothing to do, nor for rounds: writing an entry again changes nothing."""

    def begin(self, position: int, last: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def committed(self) -> None:
        pass

    def close(self) -> None:
        self._folders.close()

    def write(self, entry: Entry) -> None:
        """Idempotent: the same flow ends in the same file, whatever was there before. Another flow's name gets
        `-<6 hex>` of this one's identity (its last, random digits: the first are the time they share)."""
        content = msgspec.json.format(msgspec.json.encode(entry.fields), indent=2) + b"\n"
        folder = self._folders.get(self._inside + entry.folder, create=True)
        for stem in _names(entry):
            if self._write_as(folder, entry, f"{stem}.json", content):
                break
        if entry.superseded:
            self._remove_superseded(entry)

    def folder_of(self, kind: str, prefix: str) -> str | None:
        try:
            found = sorted(folders.folders_in(self._folders.get(self._inside + kind)))
        except FileNotFoundError:
            return None
        return next((name for name in found if name.rpartition("_")[0] == prefix), None)

    def make(self, folder: str) -> None:
        self._folders.get((self._inside + folder).strip("/"), create=True)

    def _write_as(self, folder: int, entry: Entry, name: str, content: bytes) -> bool:
        """False when the name is another's, or that of a link, a folder or a device."""
        try:
            self._create(folder, name, content)
            return True
        except FileExistsError:
            existing = folders.read_file(folder, name)
        if existing is None:
            return False
        owner = _owner(existing, entry.owner_field)
        if owner not in (None, entry.owner):
            return False
        if existing != content:
            _replace(folder, name, content)
        return True

    def _create(self, folder: int, name: str, content: bytes) -> None:
        if self._nameless:
            try:
                descriptor = os.open(".", _NAMELESS, 0o600, dir_fd=folder)
            except OSError as error:
                if error.errno not in _NO_NAMELESS:
                    raise
                self._nameless = False
            else:
                _put(descriptor, content, link_as=(folder, name))
                return
        _put(os.open(name, _CREATE, 0o600, dir_fd=folder), content)

    def _remove_superseded(self, entry: Entry) -> None:
        above, _, stem = entry.superseded.rpartition("/")
        try:
            folder = self._folders.get(self._inside + above)
        except FileNotFoundError:
            return
        for name in (f"{stem}.json", f"{stem}-{entry.owner[-6:]}.json"):
            content = folders.read_file(folder, name)
            if content is not None and _owner(content, entry.owner_field) == entry.owner:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def _names(entry: Entry) -> tuple[str, str, str]:
    return entry.stem, f"{entry.stem}-{entry.owner[-6:]}", f"{entry.stem}-{entry.owner}"


def _owner(content: bytes, field: str) -> str | None:
    """None for a file that is not whole."""
    try:
        found = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return None
    return str(found.get(field)) if isinstance(found, dict) else None


def _put(descriptor: int, content: bytes, *, link_as: tuple[int, str] | None = None) -> None:
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        if link_as:
            # With a directory descriptor Python calls linkat, which alone follows the link in /proc.
            folder, name = link_as
            os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(descriptor)


def _replace(folder: int, name: str, content: bytes) -> None:
    beside = f".{name}.new"
    with suppress(FileNotFoundError):
        os.unlink(beside, dir_fd=folder)
    _put(os.open(beside, _CREATE, 0o600, dir_fd=folder), content)
    os.replace(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
