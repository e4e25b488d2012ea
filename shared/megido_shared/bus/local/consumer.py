"""A member of a consumer group on the local bus."""

import asyncio
import os
import time
from collections.abc import Collection, Mapping

from megido_shared.bus.base import Batch, Gap, Position, Record, Resume, Revoked, Stream
from megido_shared.bus.local import groups, locks
from megido_shared.bus.local.discovery import Discovery
from megido_shared.bus.local.groups import Group, Membership
from megido_shared.bus.local.reader import StreamReader
from megido_shared.bus.local.segments import OVERHEAD
from megido_shared.datadir import DataDir
from megido_shared.errors import Unavailable

TICK = 0.004
IDLE_TICK = 0.015
"""Seconds between looks for new records, while they come and after a quiet moment."""
QUIET_AFTER = 0.1
TAKE_SECONDS = 0.1
BALANCE_SECONDS = 0.5
FREE_SECONDS = 1.0
TOUCH_SECONDS = 30.0


class LocalConsumer:
    """Reads the streams that it has locked for its group. One task at a time may call `poll`."""

    def __init__(
        self,
        data_dir: DataDir,
        group: Group,
        topics: Collection[str],
        *,
        resume: Resume | None,
        revoked: Revoked | None,
        pins: bool,
    ) -> None:
        self._data_dir = data_dir
        self._group = group
        self._pins = pins
        self._resume = resume
        self._revoked = revoked
        self._member = Membership(group)
        self._discovery = Discovery(data_dir.bus, topics)
        self._readers: dict[Stream, StreamReader] = {}
        self._held: dict[Stream, int] = {}
        self._committed: dict[Stream, int] = {}
        self._gaps: list[Gap] = []
        self._reading: asyncio.Task[Batch] | None = None
        self._members = 1
        self._due = dict.fromkeys(("take", "balance", "free", "touch"), 0.0)
        self._first = 0

    async def poll(self, *, max_records: int = 2000, max_bytes: int = 8 << 20, timeout: float = 1.0) -> Batch:
        now = time.monotonic()
        deadline, quiet = now + timeout, now + QUIET_AFTER
        if self._reading and (batch := await self._read(max_records, max_bytes)):
            return batch
        while True:
            await self._keep_up()
            if self._gaps or any(reader.has_news() for reader in self._readers.values()):
                batch = await self._read(max_records, max_bytes)
                if batch:
                    return batch
            now = time.monotonic()
            if now >= deadline:
                return Batch()
            await asyncio.sleep(min(TICK if now < quiet else IDLE_TICK, deadline - now))

    async def commit(self, positions: Mapping[Stream, int]) -> None:
        moved = {
            stream: offset
            for stream, offset in positions.items()
            if stream in self._held and self._committed.get(stream) != offset
        }
        try:
            await asyncio.to_thread(self._write_acks, moved)
        except OSError as error:
            raise Unavailable(f"an acknowledgement cannot be written: {error.strerror} ({error.filename})") from error
        self._committed.update((stream, offset) for stream, offset in moved.items() if stream in self._held)

    def assigned(self) -> frozenset[Stream]:
        return frozenset(self._readers)

    async def lag(self) -> Mapping[Stream, int]:
        """Bytes between what is committed and the end of each assigned stream."""
        return {
            stream: max(0, reader.end() - self._committed.get(stream, 0)) for stream, reader in self._readers.items()
        }

    async def close(self) -> None:
        if self._reading:
            await asyncio.wait([self._reading])
        for stream in list(self._held):
            self._let_go(stream)
        self._member.close()

    async def _read(self, max_records: int, max_bytes: int) -> Batch:
        """Off the loop: the disk may be slow. A batch that a cancelled poll did not take is kept for the next."""
        if self._reading is None:
            work = asyncio.to_thread(self._collect, list(self._readers.values()), max_records, max_bytes)
            self._reading = asyncio.create_task(work)
        try:
            batch = await asyncio.shield(self._reading)
        except OSError as error:
            self._reading = None
            raise _unreadable(error) from error
        self._reading = None
        return Batch(
            [record for record in batch.records if record.stream in self._held],
            [gap for gap in batch.gaps if gap.stream in self._held],
        )

    def _collect(self, readers: list[StreamReader], max_records: int, max_bytes: int) -> Batch:
        """Fills one batch, beginning at another stream each time so that none starves. A stream that cannot be read
        costs the others nothing: the error is raised when there is nothing else."""
        records: list[Record] = []
        gaps, self._gaps = self._gaps, []
        failed: OSError | None = None
        room = max_bytes
        self._first = (self._first + 1) % max(1, len(readers))
        for reader in [*readers[self._first :], *readers[: self._first]]:
            if room <= 0 or len(records) >= max_records:
                break
            if not reader.has_news():
                continue
            try:
                found = reader.read(max_records - len(records), room)
            except OSError as error:
                failed = error
                continue
            for item in found:
                if isinstance(item, Record):
                    records.append(item)
                    room -= len(item.value) + len(item.key) + OVERHEAD
                else:
                    gaps.append(item)
        if failed and not (records or gaps):
            raise failed
        return Batch(records, gaps)

    async def _keep_up(self) -> None:
        """Follows what changes around it: slots, segments, members."""
        try:
            changed = self._discovery.look()
        except OSError as error:
            raise _unreadable(error) from error
        if changed:
            for stream, reader in self._readers.items():
                if found := self._discovery.streams.get(stream):
                    reader.update(found.names)
        if self._is_due("balance", BALANCE_SECONDS):
            self._members = self._member.live_members()
            for reader in self._readers.values():
                reader.look_again()
            await self._give_up_surplus()
        if changed or self._is_due("take", TAKE_SECONDS):
            await self._take_free_streams()
        if self._is_due("touch", TOUCH_SECONDS):
            self._member.touch()

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._due[what]:
            return False
        self._due[what] = now + every
        return True

    def _share(self) -> int:
        """How many streams this member may read: all of them, divided among the members, rounded up."""
        return -(-len(self._discovery.streams) // self._members)

    async def _give_up_surplus(self) -> None:
        surplus = sorted(self._readers)[self._share() :]
        if not surplus:
            return
        if self._revoked:
            await self._revoked(surplus)
        for stream in surplus:
            self._let_go(stream)

    async def _take_free_streams(self) -> None:
        room = self._share() - len(self._readers)
        taken: dict[Stream, int] = {}
        try:
            for stream in self._discovery.streams:
                if len(taken) >= room:
                    break
                if stream not in self._held and (fd := self._group.stream_lock(stream)) is not None:
                    taken[stream] = fd
            if not taken:
                return
            stored = await self._resume(taken.keys()) if self._resume else {}
        except BaseException:
            for fd in taken.values():
                os.close(fd)
            raise
        failed: OSError | None = None
        for stream, fd in taken.items():
            try:
                self._begin(stream, fd, stored.get(stream))
            except OSError as error:
                os.close(fd)  # free for whoever can read it; the next look tries again
                failed = error
        if failed:
            raise _unreadable(failed) from failed

    def _begin(self, stream: Stream, fd: int, position: Position | None) -> None:
        found = self._discovery.streams[stream]
        reader = StreamReader(found.slot, stream, found.names)
        if position is None and (ack := self._group.ack(stream)) is not None:
            position = Position(ack)
        if position is not None and (gap := reader.seek(position)):
            self._gaps.append(gap)
        self._committed[stream] = reader.position
        self._readers[stream] = reader
        self._held[stream] = fd

    def _let_go(self, stream: Stream) -> None:
        self._readers.pop(stream).close()
        self._committed.pop(stream, None)
        self._gaps = [gap for gap in self._gaps if gap.stream != stream]
        os.close(self._held.pop(stream))

    def _write_acks(self, positions: Mapping[Stream, int]) -> None:
        for stream, offset in positions.items():
            self._group.write_ack(stream, offset)
        if self._pins and self._is_due("free", FREE_SECONDS):
            self._free_adopted()

    def _free_adopted(self) -> None:
        """Frees segments of slots that have no writer; a live writer frees its own."""
        for stream in self._held.copy():
            found = self._discovery.streams.get(stream)
            if found and not locks.slot_is_live(found.slot):
                groups.free(found.slot, groups.freeable(self._data_dir, found.slot, found.names))


def _unreadable(error: OSError) -> Unavailable:
    return Unavailable(f"the local bus cannot be read: {error.strerror} ({error.filename})")
