"""Which streams there are: slots and segments, looked for again only where a directory changed."""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megido_shared.bus.base import Stream
from megido_shared.bus.local.segments import Name, list_segments

_UNSURE_NS = 100_000_000
"""A directory's time of change has the grain of a kernel tick: a listing made this soon after it is not final."""


@dataclass(frozen=True, slots=True)
class Found:
    """A stream that exists: where, and its segments, oldest first."""

    slot: Path
    names: list[Name]


class _Directory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._changed = -1
        self._listed = -1

    def changed(self) -> bool:
        """Whether it has to be listed (again); the caller then does."""
        try:
            changed = os.stat(self.path).st_mtime_ns  # noqa: PTH116 - half the time of Path.stat, and runs often
        except FileNotFoundError:
            return False
        if changed == self._changed and self._listed - changed > _UNSURE_NS:
            return False
        self._changed, self._listed = changed, time.time_ns()
        return True


class Discovery:
    """The streams of the wanted topics below one bus directory."""

    def __init__(self, bus: Path, topics: Collection[str]) -> None:
        self._topics = frozenset(topics)
        self._bus = _Directory(bus)
        self._slots: dict[str, _Directory] = {}
        self._by_slot: dict[str, dict[Stream, Found]] = {}
        self.streams: dict[Stream, Found] = {}

    def look(self) -> bool:
        """Brings `streams` up to date; whether anything may have changed. Cheap when nothing did."""
        if self._bus.changed():
            for entry in os.scandir(self._bus.path):
                if entry.name not in self._slots and entry.is_dir():
                    self._slots[entry.name] = _Directory(Path(entry.path))
        changed = [name for name, directory in self._slots.items() if directory.changed()]
        for name in changed:
            self._by_slot[name] = self._list(self._slots[name].path)
        if changed:
            self.streams = {stream: found for slot in self._by_slot.values() for stream, found in slot.items()}
        return bool(changed)

    def _list(self, slot: Path) -> dict[Stream, Found]:
        return {
            Stream(names[-1].epoch, topic, 0): Found(slot, names)
            for topic, names in list_segments(slot).items()
            if topic in self._topics
        }
