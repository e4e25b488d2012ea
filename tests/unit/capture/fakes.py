"""A journal in memory and a node's parts around it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megido_capture.counters import Counters
from megido_capture.recording.emitter import Emitter
from megido_capture.recording.recorder import Recorder
from megido_capture.recording.state import Keep, Registry
from megido_shared import events
from megido_shared.testing import FakeClock


@dataclass
class MemoryJournal:
    node: str = "capture-0"
    epoch: bytes = bytes(16)
    dropped: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    used_bytes: int = 0
    cap_bytes: int = 1 << 30
    records: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    broken: bool = False
    last_seq: int = 0

    def figures(self) -> dict[str, int]:
        return {"dropped": self.dropped, **{f"dropped:{reason}": count for reason, count in self.drops.items()}}

    def next_seq(self) -> int:
        self.last_seq += 1
        return self.last_seq

    def append(self, topic: str, key: bytes, value: bytes, seq: int = 0) -> bool:
        if self.broken:
            raise OSError("disk")
        self.sizes.append(len(value))
        self.records.append(events.decode(value))
        return True


class Parts:
    def __init__(self, cap: int = 1000) -> None:
        self.journal = MemoryJournal()
        self.counters = Counters()
        self.registry = Registry()
        self.emitter = Emitter(self.journal, "browser")
        self.clock = FakeClock()
        self.recorder = Recorder(self.emitter, self.registry, self.counters, self.clock, Keep(True, cap, cap, cap))
