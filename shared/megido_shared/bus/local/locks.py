"""Advisory locks between the processes that share a data directory.

All of them are open-file-description locks (`F_OFD_SETLK`), not `flock`: the kernel drops them when the holder
dies however it dies, two descriptors of one process exclude each other too, single bytes can be locked, and
above all `F_OFD_GETLK` can *ask* whether somebody holds one without taking it for a moment. A probe that takes a
shared lock can make the real owner's start fail; `F_OFD_GETLK` does not see `flock`, so one scheme serves all.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid on 64-bit Linux

SLOT_LOCK = "lock"


def _request(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


def open_lock_file(path: Path) -> int:
    """A descriptor to lock on, made with mode 0600 if need be. Not inherited by child processes."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(fd: int, *, start: int = 0, length: int = 0) -> bool:
    """Takes the exclusive lock on a range (`length` 0: to the end of everything), or returns False at once."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_WRLCK, start, length))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int, *, start: int = 0, length: int = 0) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, start, length))


def is_locked(fd: int, *, start: int = 0, length: int = 0) -> bool:
    """Whether another descriptor holds a lock in the range. Takes nothing, so it disturbs nobody."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, start, length))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def is_path_locked(path: Path) -> bool:
    """`is_locked` of a file that may not exist."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return is_locked(fd)
    finally:
        os.close(fd)


def slot_is_live(slot: Path) -> bool:
    """Whether a writer holds the slot now."""
    return is_path_locked(slot / SLOT_LOCK)
