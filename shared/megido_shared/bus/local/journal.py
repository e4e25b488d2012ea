"""A producer's journal: the durable log that it appends to, and at once the local bus that others read.

The contract of `Journal.append`: after it returned True, a `kill -9` of this process loses nothing (the bytes
are in the page cache); a background fsync bounds what a power failure loses to 200 ms. It never raises into
its caller and never waits: what cannot be written is dropped, and counted. Who would rather wait than lose asks
`Room` before the work whose record will need the space.
"""

import errno
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from megido_shared import events, ids
from megido_shared.bus.base import Record, Stream
from megido_shared.bus.local import groups, locks
from megido_shared.bus.local.drops import Drops
from megido_shared.bus.local.files import make_dir, sync_dir
from megido_shared.bus.local.segments import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    OVERHEAD,
    TOPIC,
    Entry,
    Name,
    list_segments,
    pack,
    scan,
)
from megido_shared.bus.topics import COUNTED, NODES
from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError

DEFAULT_CAP_BYTES = 4 << 30
DEFAULT_SEGMENT_BYTES = 16 << 20
MIN_SEGMENT_BYTES = 64 << 10
MAX_RESERVE_BYTES = 64 << 20
DROP_REASONS = ("cap", "disk", "short_write", "too_large", "closed")
SYNC_SECONDS = 0.2
FREE_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tail:
    """The segment that a topic is appended to."""

    name: Name
    fd: int
    size: int
    marker: bytes
    dirty: bool = False
    damaged: bool = False


class Journal:
    """One slot, held by this process until `close` or death. Safe to use from several threads."""

    def __init__(
        self,
        data_dir: DataDir,
        slot: Path,
        lock_fd: int,
        *,
        cap_bytes: int,
        segment_bytes: int,
    ) -> None:
        self.node = slot.name
        self.cap_bytes = cap_bytes
        """May be changed while others append."""
        self.dropped = 0
        """Records that were not written, for whatever reason."""
        self.drops: Counter[str] = Counter()
        """`dropped` by reason, one of DROP_REASONS."""
        self._drops_terminal = Drops(slot)
        self.sync_errors = 0
        self._data_dir = data_dir
        self._slot = slot
        self._lock_fd = lock_fd
        # A segment is freed whole: several must fit below the cap.
        self._segment_bytes = min(segment_bytes, max(cap_bytes // 8, MIN_SEGMENT_BYTES))
        self._lock = threading.Lock()
        self._tails: dict[str, _Tail] = {}
        self._older: dict[str, list[Name]] = {}
        self._retired: list[int] = []
        self._new_files = False
        self._disk_failed = False
        """Since something was freed last."""
        self._stopping = threading.Event()
        self._closed = False
        self._recover()
        self._keeper = threading.Thread(target=self._keep, name=f"journal {self.node}", daemon=True)
        self._keeper.start()

    @classmethod
    def open(
        cls,
        data_dir: DataDir,
        name: str,
        *,
        cap_bytes: int = DEFAULT_CAP_BYTES,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    ) -> Self:
        """Takes the first free slot `<name>-<n>` (its node, its epoch, its count of terminal records go on where
        they were) and begins new segments. At `cap_bytes` of unfreed segments an append is dropped. Raises
        ConfigurationError when the data directory cannot be used."""
        if not TOPIC.fullmatch(name):
            raise ConfigurationError(f"a node cannot be called {name!r}; use letters, digits, . _ and -")
        try:
            slot, fd = _take_slot(make_dir(data_dir.ensure().bus), name)
            return cls(data_dir, slot, fd, cap_bytes=cap_bytes, segment_bytes=segment_bytes)
        except OSError as error:
            raise ConfigurationError(f"the journal in {data_dir.bus} cannot be opened: {error.strerror}") from error

    @property
    def used_bytes(self) -> int:
        """The size of the slot's segments that are not freed yet."""
        return self._used

    @property
    def dropped_terminal(self) -> int:
        """Dropped records that accounting counts (seq > 0), since the epoch began."""
        return self._drops_terminal.reasons.total()

    def figures(self) -> dict[str, int]:
        """What a heartbeat says of its journal. `dropped` and `dropped:<reason>`: since this start, of all records.
        `dropped_terminal` and `dropped_terminal:<reason>`: of those that accounting counts, since the epoch began.
        `journal_waiting`: bytes of topics with such records that not every reader is done with."""
        self._save_drops()  # what was told must outlast a kill
        terminal = self._drops_terminal.reasons
        return {
            "dropped": self.dropped,
            "dropped_terminal": terminal.total(),
            "journal_waiting": self._waiting_bytes(),
            **{f"dropped:{reason}": count for reason, count in self.drops.items()},
            **{f"dropped_terminal:{reason}": count for reason, count in terminal.items()},
        }

    def _waiting_bytes(self) -> int:
        with self._lock:
            ends = {topic: tail.name.base + tail.size for topic, tail in self._tails.items() if topic in COUNTED}
        epoch = self.epoch.hex()
        return sum(max(0, end - (groups.free_limit(self._data_dir, epoch, topic) or 0)) for topic, end in ends.items())

    @property
    def is_nearly_full(self) -> bool:
        """Whether only the reserve is left: a quarter of the cap, 64 MiB at most, for the records of what is under way
        when `Room` lets nothing new begin."""
        return self._used >= self.cap_bytes - min(self.cap_bytes // 4, MAX_RESERVE_BYTES)

    @property
    def last_seq(self) -> int:
        """The number that was given last, also by an earlier run of this node; 0 for none."""
        return self._seq

    def next_seq(self) -> int:
        """The number of the next terminal record; each is given once."""
        with self._lock:
            self._seq += 1
            return self._seq

    def publish(self, event: events.AnyEvent) -> bool:
        """Appends an event to its topic under its key."""
        return self.append(events.topic_of(event).name, events.key_of(event), events.encode(event), event.seq)

    def append(self, topic: str, key: bytes, value: bytes, seq: int = 0) -> bool:
        """Appends one record. True: a kill -9 cannot lose it any more. False: dropped, and counted."""
        with self._lock:
            size = OVERHEAD + len(key) + len(value)
            if len(key) > MAX_KEY_BYTES or len(value) > MAX_VALUE_BYTES:
                return self._drop("too_large", seq)
            if self._used + size > self.cap_bytes or self._closed:
                return self._drop("cap", seq)
            try:
                tail = self._tails.get(topic)
                if tail is None or tail.size >= self._segment_bytes or tail.damaged:
                    tail = self._roll(topic)
                written = os.write(tail.fd, pack(tail.marker, key, value, seq))
            except OSError as error:
                return self._drop("disk", seq, error)
            if written != size:
                self._take_back(tail, written)
                return self._drop("short_write", seq)
            tail.size += size
            tail.dirty = True
            self._used += size
            return True

    def began_at(self, topic: str) -> int:
        """The offset from which on this run writes; what lies before it is of earlier runs."""
        return self._began.get(topic, 0)

    def read_back(self, topic: str) -> Iterator[Record]:
        """What is still in this slot's segments of the topic, oldest first; damaged records are left out."""
        stream = Stream(self.epoch.hex(), topic, 0)
        for name in list_segments(self._slot).get(topic, []):
            try:
                data = (self._slot / name.file).read_bytes()
            except FileNotFoundError:
                continue
            for entry in scan(data, name.marker):
                if isinstance(entry, Entry):
                    yield Record(stream, name.base + entry.start, name.base + entry.end, entry.key, entry.value)

    def sync(self) -> None:
        """Makes what was appended outlast a power failure. The background thread does this every 200 ms."""
        with self._lock:
            dirty = [tail for tail in self._tails.values() if tail.dirty]
            for tail in dirty:
                tail.dirty = False
            retired, self._retired = self._retired, []
            new_files, self._new_files = self._new_files, False
        for fd in [*(tail.fd for tail in dirty), *retired]:
            self._fsync(fd)
        for fd in retired:
            os.close(fd)
        if new_files:
            sync_dir(self._slot)

    def free(self) -> None:
        """Removes the segments that every pinning group is done with. The background thread does this too."""
        with self._lock:
            topics = {topic: [*older, self._tails[topic].name] for topic, older in self._older.items()}
        for topic, names in topics.items():
            gone = groups.freeable(self._data_dir, self._slot, names)
            if not gone:
                continue
            sizes = sum(after.base - name.base for name, after in itertools.pairwise(names) if name in gone)
            groups.free(self._slot, gone)
            with self._lock:
                self._older[topic] = [name for name in self._older[topic] if name not in gone]
                self._used -= sizes
                self._disk_failed = False

    def close(self) -> None:
        """Syncs and lets go of the slot. Later appends are dropped and counted."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._stopping.set()
        self._keeper.join()
        for tail in self._tails.values():
            os.close(tail.fd)
        os.close(self._lock_fd)

    def _recover(self) -> None:
        """Finds epoch and seq in the newest segment of each topic, and begins a new one behind it.

        The newest segment is never freed, so these need no file of their own that could fall out of step.
        """
        found = list_segments(self._slot)
        newest = [names[-1] for names in found.values()]
        self.epoch = bytes.fromhex(newest[0].epoch) if newest else ids.new_id()
        self._seq = max((max(name.seq, _last_seq(self._slot, name)) for name in newest), default=0)
        self._seq = max(self._seq, self._drops_terminal.seq)
        self._used = 0
        self._began: dict[str, int] = {}
        for topic, names in found.items():
            end = names[-1].base + (self._slot / names[-1].file).stat().st_size
            self._used += end - names[0].base
            self._began[topic] = end
            self._older[topic] = names[:-1]
            self._start(topic, names[-1], end)

    def _start(self, topic: str, newest: Name, end: int) -> None:
        """A start never writes behind what another run wrote: a torn tail stays at the end of its segment."""
        if newest.base == end:
            self._tails[topic] = self._create(newest)
            return
        try:
            self._tails[topic] = self._create(Name(topic, end, self._seq, newest.epoch))
        except OSError as error:
            # A full disk at the start: a later append tries again behind the old segment.
            _log.warning("no new segment for %s: %s", topic, error)
            fd = os.open(self._slot / newest.file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._tails[topic] = _Tail(newest, fd, end - newest.base, newest.marker, damaged=True)
            return
        self._older[topic].append(newest)

    def _create(self, name: Name) -> _Tail:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self._slot / name.file, flags, 0o600)
        self._new_files = True
        return _Tail(name, fd, 0, name.marker)

    def _roll(self, topic: str) -> _Tail:
        """Begins the topic's next segment. When that fails, an undamaged old one is simply written on."""
        old = self._tails.get(topic)
        if old is None:
            if not TOPIC.fullmatch(topic):
                raise OSError(errno.EINVAL, f"{topic!r} is no topic name")
            tail = self._create(Name(topic, 0, self._seq, self.epoch.hex()))
            self._older[topic] = []
        else:
            try:
                end = old.name.base + os.fstat(old.fd).st_size
                tail = self._create(Name(topic, end, self._seq, self.epoch.hex()))
            except OSError:
                if old.damaged:
                    raise
                return old
            self._older[topic].append(old.name)
            self._retired.append(old.fd)
        self._tails[topic] = tail
        return tail

    def _take_back(self, tail: _Tail, written: int) -> None:
        """Removes the beginning of a record that did not fit; if even that fails, nothing more goes behind it."""
        try:
            os.ftruncate(tail.fd, tail.size)
        except OSError:
            tail.damaged = True
            self._used += written

    def _drop(self, reason: str, seq: int, error: OSError | None = None) -> bool:
        reason = "closed" if self._closed else reason
        self._disk_failed |= reason in ("disk", "short_write")
        self.dropped += 1
        self.drops[reason] += 1
        if seq > 0:
            self._drops_terminal.add(reason, seq)
        # 1, 2, 4, 8, …: a full disk must not fill a log.
        count = self.drops[reason]
        if count & (count - 1) == 0:
            _log.warning("journal %s dropped %d records so far (%s%s)", self.node, count, reason, _why(error))
        return False

    def _keep(self) -> None:
        """The background thread: fsync, and freeing."""
        last_free = 0.0
        stop = False
        while not stop:
            stop = self._stopping.wait(SYNC_SECONDS)
            try:
                self._save_drops()
                self.sync()
                if not stop and (self._wants_room() or time.monotonic() - last_free >= FREE_SECONDS):
                    last_free = time.monotonic()
                    self._give_back()
                    self.free()
            except OSError as error:
                self._count_sync_error(error)

    def _save_drops(self) -> None:
        with self._lock:
            try:
                self._drops_terminal.save()
            except OSError as error:
                self._count_sync_error(error)

    def _wants_room(self) -> bool:
        return self._used > self.cap_bytes // 2 or self._disk_failed

    def _give_back(self) -> None:
        """Rolls a tail that is done with when the cap is near, or the disk full: the newest segment cannot be freed,
        the one before it can."""
        with self._lock:
            near = self._wants_room() and not self._closed
            ends = {topic: (tail, tail.name.base + tail.size) for topic, tail in self._tails.items() if tail.size}
        for topic, (tail, end) in ends.items() if near else ():
            limit = groups.free_limit(self._data_dir, tail.name.epoch, topic)
            with self._lock:
                if limit == end == tail.name.base + tail.size and self._tails[topic] is tail and not self._closed:
                    self._roll(topic)

    def _fsync(self, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            self._count_sync_error(error)

    def _count_sync_error(self, error: OSError) -> None:
        self.sync_errors += 1
        if self.sync_errors & (self.sync_errors - 1) == 0:
            _log.warning("journal %s: %s (%d times)", self.node, error, self.sync_errors)


def _take_slot(bus: Path, name: str) -> tuple[Path, int]:
    """The first slot that nobody holds, and the descriptor that holds it."""
    n = 0
    while True:
        slot = make_dir(bus / f"{name}-{n}")
        fd = locks.open_lock_file(slot / locks.SLOT_LOCK)
        if locks.try_lock(fd):
            return slot, fd
        os.close(fd)
        n += 1


def _last_seq(slot: Path, name: Name) -> int:
    """The highest seq that the node is known to have given out, from one segment. A heartbeat knows of those too
    whose records were dropped."""
    data = (slot / name.file).read_bytes()
    entries = [entry for entry in scan(data, name.marker) if isinstance(entry, Entry)]
    told = _captured(entries[-1].value) if entries and name.topic == NODES.name else 0
    return max([told, *(entry.seq for entry in entries)])


def _captured(value: bytes) -> int:
    try:
        event = events.decode(value)
    except msgspec.DecodeError:
        return 0
    return event.captured if isinstance(event, events.NodeStatus) else 0


def _why(error: OSError | None) -> str:
    return f": {error.strerror}" if error else ""
