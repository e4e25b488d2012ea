"""Reads one stream: the records that one producer wrote on one topic, segment after segment."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from megido_shared.bus.base import Gap, Position, Record, Stream
from megido_shared.bus.identity import event_id_of
from megido_shared.bus.local.locks import slot_is_live
from megido_shared.bus.local.segments import (
    OVERHEAD,
    Entry,
    Name,
    classify_tail,
    next_boundary,
    parse_one,
    scan,
    wanted_bytes,
)

CHUNK_BYTES = 1 << 20


class StreamReader:
    """`position` is the offset of what `read` looks at next. Not safe to use from two threads at once."""

    def __init__(self, slot: Path, stream: Stream, names: Sequence[Name]) -> None:
        """`names` are the stream's segments, at least one, oldest first."""
        self.stream = stream
        self.slot = slot
        self.position = names[0].base
        self._names = list(names)
        self._open: Name | None = None
        self._fd = -1
        self._waited_at = -1

    def update(self, names: Sequence[Name]) -> None:
        """What the slot's directory lists now."""
        self._names = list(names)

    def seek(self, position: Position) -> Gap | None:
        """Goes to a stored position. When that is not a place in this log where such an event ended, starts over
        at the low watermark and says so."""
        if position.offset <= self.end() and self._fits(position):
            self.position = position.offset
            return None
        low = self._names[0].base
        gap = Gap(self.stream, position.offset, low, "rewound", 0)
        self.position = low
        return gap

    def end(self) -> int:
        """The offset behind the last byte of the stream."""
        for name in reversed(self._names):
            with contextlib.suppress(FileNotFoundError):
                return name.base + (self.slot / name.file).stat().st_size
        return self.position

    def has_news(self) -> bool:
        """Whether `read` may return something now. Cheap: one fstat."""
        if self._open is None or not self._names or self._open != self._names[-1]:
            return True
        size = os.fstat(self._fd).st_size
        return self._open.base + size > self.position and size != self._waited_at

    def look_again(self) -> None:
        """Lets `has_news` ask once more about an incomplete tail: its writer may have died."""
        self._waited_at = -1

    def read(self, max_records: int, max_bytes: int) -> list[Record | Gap]:
        """What is there, in order; one record at least if there is one, whatever its size. Raises OSError only when
        it has nothing: what it has read already is behind its position and would be lost."""
        out: list[Record | Gap] = []
        taken = 0
        while len(out) < max_records and taken < max_bytes:
            before = self.position
            try:
                if not self._step(out, max_records, max_bytes - taken):
                    break
            except OSError:
                if not out:
                    raise
                break
            taken += self.position - before
        return out

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._open = None

    def _step(self, out: list[Record | Gap], max_records: int, max_bytes: int) -> bool:
        """One read of one segment, or the change to the next. False when there is nothing to go on with."""
        gap = self._enter()
        if gap:
            out.append(gap)
        name = self._open
        if name is None:
            return False
        chunk = os.pread(self._fd, min(CHUNK_BYTES, max_bytes + OVERHEAD), self.position - name.base)
        if not chunk:
            return self._next_segment(out)
        return self._take(chunk, out, max_records, max_bytes) or self._stuck(chunk, out)

    def _take(self, chunk: bytes, out: list[Record | Gap], max_records: int, max_bytes: int) -> bool:
        """Appends the whole valid records at the front of `chunk`. False when there is none."""
        assert self._open
        marker, base, at = self._open.marker, self.position, 0
        while len(out) < max_records and at < max_bytes:
            entry = parse_one(chunk, at, marker)
            if entry is None:
                break
            out.append(Record(self.stream, base + at, base + entry.end, entry.key, entry.value))
            at = entry.end
        self.position = base + at
        return at > 0

    def _stuck(self, chunk: bytes, out: list[Record | Gap]) -> bool:
        """No valid record lies at the position, as far as `chunk` goes."""
        name = self._open
        assert name
        wanted = wanted_bytes(chunk, 0, name.marker)
        if wanted > len(chunk):
            chunk = os.pread(self._fd, wanted, self.position - name.base)
            if self._take(chunk, out, len(out) + 1, wanted):
                return True
        # Asked before the bytes are read again: what a writer did before it died is then in them.
        final = name != self._names[-1] or not slot_is_live(self.slot)
        size = os.fstat(self._fd).st_size
        rest = os.pread(self._fd, name.base + size - self.position, self.position - name.base)
        if self._take(rest, out, len(out) + 1, len(rest)):
            return True
        end = next_boundary(rest, 0, name.marker, live=not final)
        if end < 0 and not final:
            self._waited_at = size
            return False
        if end >= 0:
            self._pass_over(out, end, "corrupt")
        elif rest:
            self._pass_over(out, len(rest), classify_tail(rest, 0, name.marker))
        return True

    def _pass_over(self, out: list[Record | Gap], length: int, kind: str) -> None:
        end = self.position + length
        out.append(Gap(self.stream, self.position, end, "torn" if kind == "torn" else "corrupt"))
        self.position = end

    def _enter(self) -> Gap | None:
        """Opens the segment that holds the position, if it is not open; says so if that has been freed."""
        if self._open is not None:
            return None
        gap: Gap | None = None
        while self._names:
            if self.position < self._names[0].base:
                low = self._names[0].base
                gap = Gap(self.stream, gap.offset if gap else self.position, low, "expired", 0)
                self.position = low
            name = [name for name in self._names if name.base <= self.position][-1]
            try:
                self._fd = os.open(self.slot / name.file, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._names = self._names[self._names.index(name) + 1 :]
                continue
            self._open = name
            self._waited_at = -1
            return gap
        return gap

    def _next_segment(self, out: list[Record | Gap]) -> bool:
        """At the end of the open segment: goes on to the next one, if there is one."""
        current = self._open
        assert current
        later = [name for name in self._names if (name.base, name.seq) > (current.base, current.seq)]
        if not later:
            return False
        listed = current in self._names
        self.close()
        if listed and later[0].base > self.position:
            # A power failure took the end of this segment, though a later one had been begun.
            out.append(Gap(self.stream, self.position, later[0].base, "corrupt", 0))
            self.position = later[0].base
        return True

    def _fits(self, position: Position) -> bool:
        """Whether the record that ends at the position has the stored event id, as far as that can be known."""
        if not position.last_event_id or position.offset <= self._names[0].base:
            return True
        name = [name for name in self._names if name.base < position.offset][-1]
        try:
            data = (self.slot / name.file).read_bytes()
        except FileNotFoundError:
            return True
        for entry in scan(data[: position.offset - name.base], name.marker):
            if isinstance(entry, Entry) and name.base + entry.end == position.offset:
                return event_id_of(entry.value) == position.last_event_id
        return False
