"""What a journal could not take, counted for accounting. The count outlives the process, so that a restart does not
make of what was dropped something that is missing for no reason."""

import logging
from collections import Counter
from pathlib import Path

import msgspec

from megido_shared.bus.local.files import replace

FILE = "drops"

_log = logging.getLogger(__name__)


class _Saved(msgspec.Struct):
    seq: int = 0
    reasons: dict[str, int] = {}


class Drops:
    """Terminal records that were dropped since the slot's epoch began. `save` is called every 200 ms; what was dropped
    since is forgotten by a kill -9."""

    def __init__(self, slot: Path) -> None:
        self._path = slot / FILE
        saved = _read(self._path)
        self.reasons = Counter(saved.reasons)
        self.seq = saved.seq
        """The highest number among them: it must not be given again, though no record of the journal has it."""
        self._on_disk = saved

    def add(self, reason: str, seq: int) -> None:
        self.reasons[reason] += 1
        self.seq = max(self.seq, seq)

    def save(self) -> None:
        """Nothing when nothing was dropped since. Raises OSError; the next call tries again."""
        now = _Saved(self.seq, dict(self.reasons))
        if now != self._on_disk:
            replace(self._path, msgspec.json.encode(now), sync=False)
            self._on_disk = now


def _read(path: Path) -> _Saved:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Saved)
    except FileNotFoundError:
        return _Saved()
    except msgspec.DecodeError as error:  # after a power failure; a node must start all the same
        _log.warning("%s is damaged, what was dropped before is not known any more: %s", path, error)
        return _Saved()
