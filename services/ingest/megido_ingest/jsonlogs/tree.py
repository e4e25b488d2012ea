"""The files below a log root: who owns a name, and what a crash may leave behind.

A new file is written without a name and linked into its folder when it is whole (`O_TMPFILE`), so that nobody reads
half of one and a kill leaves nothing behind; it costs what a plain write does, a temporary file and a rename cost
more. Where the file system cannot do that, it is written plainly: a kill may then leave a half file, but the
reader's position in the feed moves on only after a whole batch, so the next start writes everything since then again,
in the same order, and whoever wanted the name first meets the half file first and completes it. A file that exists
whole is replaced by rename. (Against a power cut nothing here is synced: Postgres is the truth, these are a copy.)
"""

import errno
import os
from pathlib import Path

import msgspec

from megido_ingest.jsonlogs.entries import Entry

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMELESS = os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
"""What a file system or kernel without O_TMPFILE says."""
_REPAIR = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class LogTree:
    """Writes entries below `root`, which is made 0700 when the first is written. Raises OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = f"{root}/"  # a Path a file costs more than rendering what goes into it
        self._made: set[str] = set()
        self._nameless = True

    def write(self, entry: Entry) -> None:
        """Idempotent: the same flow ends in the same file, whatever was there before. Another flow's name gets
        `-<6 hex>` of this one's identity (its last, random digits: the first are the time they share)."""
        content = msgspec.json.format(msgspec.json.encode(entry.fields), indent=2) + b"\n"
        for stem in _names(entry):
            if self._write_as(entry, f"{entry.folder}/{stem}.json", content):
                break
        if entry.superseded:
            self._remove_superseded(entry)

    def folder_of(self, kind: str, prefix: str) -> str | None:
        """The name of the folder below `kind` that is called `<prefix>_<digits>`; None when there is none."""
        try:
            names = sorted(path.name for path in (self.root / kind).iterdir())
        except FileNotFoundError:
            return None
        return next((name for name in names if name.rpartition("_")[0] == prefix), None)

    def make(self, folder: str) -> None:
        """Makes the root and a folder below it, each 0700: what was captured is its owner's alone."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        path = self.root
        _private(path)
        for part in Path(folder).parts:
            path = path / part
            _private(path)
        self._made.add(folder)

    def _write_as(self, entry: Entry, name: str, content: bytes) -> bool:
        try:
            self._create(entry.folder, self._prefix + name, content)
            return True
        except FileExistsError:
            path = self.root / name
            existing = path.read_bytes()
        owner = _owner(existing, entry.owner_field)
        if owner is None:
            _put(os.open(path, _REPAIR), content)
        elif owner != entry.owner:
            return False
        elif existing != content:
            _replace(path, content)
        return True

    def _create(self, folder: str, path: str, content: bytes) -> None:
        if folder not in self._made:
            self.make(folder)
        try:
            self._create_in_place(folder, path, content)
        except FileNotFoundError:  # somebody tidied up
            self.make(folder)
            self._create_in_place(folder, path, content)

    def _create_in_place(self, folder: str, path: str, content: bytes) -> None:
        if self._nameless:
            try:
                descriptor = os.open(f"{self._prefix}{folder}", _NAMELESS, 0o600)
            except OSError as error:
                if error.errno not in _NO_NAMELESS:
                    raise
                self._nameless = False
            else:
                _put(descriptor, content, link_as=path)
                return
        _put(os.open(path, _CREATE, 0o600), content)

    def _remove_superseded(self, entry: Entry) -> None:
        folder, _, stem = entry.superseded.rpartition("/")
        for name in (stem, f"{stem}-{entry.owner[-6:]}"):
            path = self.root / folder / f"{name}.json"
            try:
                if _owner(path.read_bytes(), entry.owner_field) == entry.owner:
                    path.unlink()
            except FileNotFoundError:
                continue


def _private(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if facts.st_mode & 0o077 and facts.st_uid == os.geteuid():
        path.chmod(0o700)


def _names(entry: Entry) -> tuple[str, str, str]:
    return entry.stem, f"{entry.stem}-{entry.owner[-6:]}", f"{entry.stem}-{entry.owner}"


def _owner(content: bytes, field: str) -> str | None:
    """None for a file that is not whole."""
    try:
        found = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return None
    return str(found.get(field)) if isinstance(found, dict) else None


def _put(descriptor: int, content: bytes, *, link_as: str = "") -> None:
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        if link_as:
            # With a directory descriptor Python calls linkat, which alone follows the link in /proc.
            os.link(f"/proc/self/fd/{descriptor}", link_as, src_dir_fd=descriptor, follow_symlinks=True)
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    _put(os.open(beside, _CREATE, 0o600), content)
    beside.replace(path)
