"""Directories 0700, files 0600, replaced whole."""

import os
from pathlib import Path

from megido_shared.ids import new_id


def make_dir(path: Path) -> Path:
    """Makes a directory and its parents below the data directory, 0700 whatever the umask lets through."""
    if not path.is_dir():
        make_dir(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


def replace(path: Path, content: bytes, *, sync: bool) -> None:
    """Writes a file so that a reader, or a crash, meets either the old or the new content. `sync` makes the
    new one outlast a power failure too."""
    temporary = path.with_name(f".{path.name}.{new_id().hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_all(fd, content)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_dir(path.parent)


def overwrite(path: Path, content: bytes) -> None:
    """Writes into a file that is there, which needs no room on the disk. A reader, or a crash, may meet a mixture."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _write_all(fd, content)
        os.ftruncate(fd, len(content))
    finally:
        os.close(fd)


def sync_dir(path: Path) -> None:
    """Makes creations and renames in a directory outlast a power failure."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
