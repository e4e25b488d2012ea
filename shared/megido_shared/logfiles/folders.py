"""A log root and the folders below it, by descriptor: nothing here follows a link, so nothing leaves the root.

Only the root's own path, which the operator chose, may lead through links. Every part below it is opened by its name
in its parent's descriptor with O_NOFOLLOW; a link, a device, a pipe or a socket that lies where a folder or file should
be is refused. A file that has a second name (a hard link) may be anybody's, and is never written into.
"""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_OPEN = 64
NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.EACCES)
"""What opening a name says that is no file which could be read or written: gone, a link, a pipe, a socket, a device, a
folder, somebody's."""


class Folders:
    """The folders of one log root, the most recently used kept open. Names hold no `/` and are neither `.` nor `..`.
    Not for two threads at once. Methods raise OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def get(self, folder: str = "", *, create: bool = False) -> int:
        """The folder's descriptor (`""`: the root's), which stays ours. Made, if asked, with mode 0700."""
        found = self._open.get(folder)
        if found is not None:
            if os.fstat(found).st_nlink:
                self._open.move_to_end(folder)
                return found
            self.close()  # somebody tidied up
        if folder:
            above, _, name = folder.rpartition("/")
            found = open_folder(self.get(above, create=create), name, create=create)
        else:
            found = open_root(self.root, create=create)
        self._open[folder] = found
        while len(self._open) > _MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return found


def open_root(root: Path, *, create: bool = False) -> int:
    if create:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    found = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return _private(found) if create else found


def open_folder(parent: int, name: str, *, create: bool = False) -> int:
    """Raises OSError; ENOTDIR or ELOOP for what is no folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise OSError(errno.EINVAL, "is no name of a folder", name)
    if not create:
        return os.open(name, DIRECTORY, dir_fd=parent)
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    return _private(os.open(name, DIRECTORY, dir_fd=parent))


def _private(descriptor: int) -> int:
    """What was captured is its owner's alone."""
    facts = os.fstat(descriptor)
    if facts.st_mode & 0o077 and facts.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o700)
    return descriptor


def read_file(folder: int, name: str, most: int = -1) -> bytes | None:
    """A regular file's contents; None for anything else, without waiting for it, and for what is gone. `most`: its last
    bytes only."""
    descriptor = open_file(folder, name)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if most >= 0:
            file.seek(max(0, os.fstat(descriptor).st_size - most))
        return file.read()


def open_file(folder: int, name: str) -> int | None:
    """A regular file, to be read; None for anything else and for what is gone."""
    try:
        descriptor = os.open(name, _READ, dir_fd=folder)
    except OSError as error:
        if error.errno in NO_FILE:
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def is_ours(facts: os.stat_result) -> bool:
    """Whether it is a regular file under one name."""
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


@contextmanager
def opened(parent: int, name: str) -> Iterator[int | None]:
    """A folder's descriptor for a while; None when there is no folder of that name."""
    try:
        descriptor = open_folder(parent, name)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
            raise
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def names(folder: int) -> list[str]:
    """What lies in a folder, in no order."""
    return os.listdir(folder)


def folders_in(folder: int) -> list[str]:
    """The names of the folders in it; links to folders are none."""
    with os.scandir(folder) as found:
        return [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
