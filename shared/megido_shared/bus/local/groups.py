"""Consumer groups on disk, and which segments they let go.

groups/<group>/members            each live member holds a lock on one byte
groups/<group>/pins/<topic>       the group pins this topic: nothing that it has not acknowledged is freed
groups/<group>/acks/<stream>      how far the group is, replaced by rename
groups/<group>/streams/<stream>   locked by the member that reads the stream
"""

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c

from megido_shared.bus.base import Stream
from megido_shared.bus.local import locks
from megido_shared.bus.local.files import make_dir, overwrite, replace
from megido_shared.bus.local.segments import TOPIC, Name
from megido_shared.bus.topics import BY_NAME, DAY_MS, INGESTED
from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError

MAX_MEMBERS = 64
ABANDONED_AFTER = 3600.0
"""Seconds after which the pins of a group without members stop counting, and only while another group with
members pins the topic: a data directory that moved from the embedded default to Kafka (or back) would
otherwise fill up for the sake of readers that never return."""

UNPINNED_BYTES = 64 << 20
"""What is kept of a stream that nobody pins (replay notifications, copies of dead letters)."""

_INGESTED = frozenset(topic.name for topic in INGESTED)


class Group:
    """A consumer group's files. Making one makes its directories."""

    def __init__(self, data_dir: DataDir, name: str) -> None:
        if not TOPIC.fullmatch(name):
            raise ConfigurationError(f"a consumer group cannot be called {name!r}; use letters, digits, . _ and -")
        self.name = name
        self.path = data_dir.groups / name
        for part in ("pins", "acks", "streams"):
            make_dir(self.path / part)

    def pin(self, topics: Iterable[str]) -> None:
        """From now on nothing of these topics is freed before this group has acknowledged it."""
        for topic in topics:
            os.close(locks.open_lock_file(self.path / "pins" / topic))

    def ack(self, stream: Stream) -> int | None:
        return _read_ack(self.path, stream.source_id, stream.topic)

    def write_ack(self, stream: Stream, offset: int) -> None:
        text = str(offset).encode()
        checked = b"%s %08x\n" % (text, google_crc32c.value(text))
        path = self.path / "acks" / _stream_file(stream.source_id, stream.topic)
        try:
            replace(path, checked, sync=False)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # A full disk has room for it where the old one is, and only acknowledgements free the disk again. Killed in
            # between it is damaged, which costs a repetition.
            overwrite(path, checked)

    def stream_lock(self, stream: Stream) -> int | None:
        """A descriptor that holds the stream for this group until it is closed; None when another member has it."""
        fd = locks.open_lock_file(self.path / "streams" / _stream_file(stream.source_id, stream.topic))
        if locks.try_lock(fd):
            return fd
        os.close(fd)
        return None


class Membership:
    """One live member of a group, until closed or dead."""

    def __init__(self, group: Group) -> None:
        self._path = group.path / "members"
        self._fd = locks.open_lock_file(self._path)
        for byte in range(MAX_MEMBERS):
            if locks.try_lock(self._fd, start=byte, length=1):
                self._byte = byte
                break
        else:
            os.close(self._fd)
            raise ConfigurationError(f"group {group.name} has {MAX_MEMBERS} members already")
        self.touch()

    def touch(self) -> None:
        """Leaves a sign of life that outlasts the lock."""
        os.utime(self._path)

    def live_members(self) -> int:
        """How many members the group has, this one included."""
        others = (byte for byte in range(MAX_MEMBERS) if byte != self._byte)
        return 1 + sum(locks.is_locked(self._fd, start=byte, length=1) for byte in others)

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.touch()
            os.close(self._fd)
            self._fd = -1


def group_is_live(data_dir: DataDir, group: str) -> bool:
    """Whether any member of the group (for example `ingest`) runs on this data directory now."""
    return locks.is_path_locked(data_dir.groups / group / "members")


def follow(data_dir: DataDir, leader: str, follower: str) -> None:
    """Moves a group's acknowledgements up to those of another group that reads the same streams meanwhile, so that
    it neither pins what the other is done with nor repeats it when its own turn comes."""
    group = Group(data_dir, follower)
    for path in (data_dir.groups / leader / "acks").glob("[!.]*"):
        topic, _, epoch = path.name.rpartition(".")
        stream = Stream(epoch, topic, 0)
        ahead = _read_ack(data_dir.groups / leader, epoch, topic)
        if ahead is not None and ahead > (group.ack(stream) or 0):
            group.write_ack(stream, ahead)


def free_limit(data_dir: DataDir, epoch: str, topic: str) -> int | None:
    """The offset of a stream up to which every pinning group is done; None when no group pins the topic."""
    pinning = [group for group in _groups(data_dir) if (group / "pins" / topic).exists()]
    if not pinning:
        return None
    live = {group for group in pinning if locks.is_path_locked(group / "members")}
    counted = [group for group in pinning if not live or group in live or _silent_for(group) < ABANDONED_AFTER]
    return min(_read_ack(group, epoch, topic) or 0 for group in counted)


def freeable(data_dir: DataDir, slot: Path, names: list[Name]) -> list[Name]:
    """Which segments of one stream may go, oldest first; `names` are all of them. Never the newest."""
    if len(names) < 2:
        return []
    newest = names[-1]
    limit = free_limit(data_dir, newest.epoch, newest.topic)
    ends = [(name, after.base) for name, after in itertools.pairwise(names)]
    if limit is not None:
        return [name for name, end in ends if end <= limit]
    if newest.topic in _INGESTED:
        return []
    known = BY_NAME.get(newest.topic)
    oldest = time.time() - (known.retention_ms if known and known.retention_ms > 0 else 7 * DAY_MS) / 1000
    return [name for name, end in ends if newest.base - end > UNPINNED_BYTES or _modified(slot / name.file) < oldest]


def free(slot: Path, names: Iterable[Name]) -> None:
    """Removes segments; one that is gone already is fine (two consumers may both be at it)."""
    for name in names:
        (slot / name.file).unlink(missing_ok=True)


def _groups(data_dir: DataDir) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from data_dir.groups.iterdir()


def _stream_file(epoch: str, topic: str) -> str:
    return f"{topic}.{epoch}"


def _read_ack(group: Path, epoch: str, topic: str) -> int | None:
    """None when there is none, or when what is there is damaged: delivering again is safe, skipping is not."""
    try:
        text, _, checksum = (group / "acks" / _stream_file(epoch, topic)).read_bytes().strip().partition(b" ")
        return int(text) if int(checksum, 16) == google_crc32c.value(text) else None
    except (FileNotFoundError, ValueError):
        return None


def _silent_for(group: Path) -> float:
    """Seconds since a member's last sign of life; a group that never had one counts as new."""
    try:
        return time.time() - (group / "members").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
