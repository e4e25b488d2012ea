"""The memory of a process, watched while it works."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression

MB = 1 << 20


def resident(pid: int) -> int:
    """Bytes that the process holds now (VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None, f"process {pid} has ended"
    return int(found[1]) * 1024


@dataclass(frozen=True)
class Sample:
    done: float
    """What the run counts: flows, messages, bytes."""
    rss: int
    seconds: float


@dataclass
class Watch:
    """Samples of one process, by what was done until each."""

    pid: int
    samples: list[Sample] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def take(self, done: float) -> None:
        self.samples.append(Sample(done, resident(self.pid), time.monotonic() - self.began))

    def warm(self, share: float = 0.1) -> Sequence[Sample]:
        """Those after the first `share` of the work: pools fill, modules load, code is compiled."""
        begin = self.samples[-1].done * share
        return [sample for sample in self.samples if sample.done >= begin]

    def slope_mb(self, per: float) -> float:
        """Megabytes that each `per` more of the work adds, after warm-up: the line of least squares."""
        warm = self.warm()
        slope, _ = linear_regression([sample.done for sample in warm], [sample.rss for sample in warm])
        return round(slope * per / MB, 3)

    def extra_mb(self) -> float:
        """The most that was held above what was held before."""
        return round((max(sample.rss for sample in self.samples) - self.samples[0].rss) / MB, 1)

    def points(self, per: float = 1.0) -> list[tuple[float, float]]:
        return [(sample.done / per, sample.rss / MB) for sample in self.samples]

    def detail(self) -> dict[str, object]:
        first, last = self.samples[0], self.samples[-1]
        return {
            "seconds": round(last.seconds, 1),
            "begin_mb": round(first.rss / MB, 1),
            "after_warm_up_mb": round(self.warm()[0].rss / MB, 1),
            "end_mb": round(last.rss / MB, 1),
            "most_mb": round(max(sample.rss for sample in self.samples) / MB, 1),
        }
