"""The configuration that a node applied last, on disk: for a start while bus and API are away.

Beside each copy there may be a mark, an empty file, that says that the configuration decided on who may use the proxy.
It is made before such a copy is written and removed only after one without it was, so that a copy that cannot be read
never opens what was closed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megido_shared.bus.local.files import make_dir, replace
from megido_shared.config import Snapshot

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[Snapshot])


class Unreadable(Exception):
    """There is a copy, and it is damaged. `guarded`: it decided on access."""

    def __init__(self, reason: str, *, guarded: bool) -> None:
        super().__init__(reason)
        self.guarded = guarded


class LastKnownGood:
    def __init__(self, directory: Path, node: str) -> None:
        self._copy = directory / node
        self._mark = directory / f"{node}.guarded"

    def load(self) -> list[Snapshot]:
        """Empty without a copy. Raises Unreadable."""
        guarded = self._mark.exists()
        try:
            digest, _, raw = self._copy.read_bytes().partition(b"\n")
            if hashlib.sha256(raw).hexdigest().encode() != digest:
                raise ValueError("its checksum is wrong")
            return _decoder.decode(raw)
        except FileNotFoundError:
            if guarded:
                raise Unreadable(f"the configuration copy {self._copy} is gone", guarded=True) from None
            return []
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise Unreadable(f"the configuration copy {self._copy} cannot be read: {error}", guarded=guarded) from error

    def save(self, snapshots: Sequence[Snapshot], *, guarded: bool) -> None:
        """Atomically, and synced. Raises OSError."""
        make_dir(self._copy.parent)
        raw = _encoder.encode(snapshots)
        if guarded:
            replace(self._mark, b"", sync=True)
        replace(self._copy, hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw, sync=True)
        if not guarded:
            self._mark.unlink(missing_ok=True)
