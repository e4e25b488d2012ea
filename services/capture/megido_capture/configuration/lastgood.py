"""The configuration that a node applied last, on disk: for a start while bus and API are away.

Beside each copy there may be a mark, a file that says that the configuration decided on who may use the proxy, and by
which scopes. It is made before such a copy is written and removed only after one without it was, so that a copy that
cannot be read never opens what was closed.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megido_shared.bus.local.files import make_dir, replace
from megido_shared.config import Snapshot


class Copy(msgspec.Struct, frozen=True, omit_defaults=True):
    """`refused`: all that was published last, when that could not be applied whole; what it restricts was in force."""

    applied: list[Snapshot] = []
    refused: list[Snapshot] = []


_decoder = msgspec.json.Decoder(Copy)


class Unreadable(Exception):
    """There is a copy, and it is damaged. `guarded`: it decided on access; `scopes` are those that it held, empty when
    that cannot be read either."""

    def __init__(self, reason: str, *, guarded: bool, scopes: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.guarded = guarded
        self.scopes = tuple(scopes)


class LastKnownGood:
    def __init__(self, directory: Path, node: str) -> None:
        self._copy = directory / node
        self._mark = directory / f"{node}.guarded"

    def load(self) -> Copy:
        """Empty without a copy. Raises Unreadable."""
        guarded = self._mark.exists()
        try:
            digest, _, raw = self._copy.read_bytes().partition(b"\n")
            if hashlib.sha256(raw).hexdigest().encode() != digest:
                raise ValueError("its checksum is wrong")
            return _decoder.decode(raw)
        except FileNotFoundError:
            if guarded:
                raise self._unreadable("is gone", guarded=True) from None
            return Copy()
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise self._unreadable(f"cannot be read: {error}", guarded=guarded) from error

    def save(self, copy: Copy, *, guarded: bool) -> None:
        """Atomically, and synced. Raises OSError."""
        make_dir(self._copy.parent)
        raw = msgspec.json.encode(copy)
        if guarded:
            scopes = sorted({snapshot.scope for snapshot in (*copy.applied, *copy.refused)})
            replace(self._mark, msgspec.json.encode(scopes), sync=True)
        replace(self._copy, hashlib.sha256(raw).hexdigest().encode() + b"\n" + raw, sync=True)
        if not guarded:
            self._mark.unlink(missing_ok=True)

    def _unreadable(self, what: str, *, guarded: bool) -> Unreadable:
        try:
            scopes = msgspec.json.decode(self._mark.read_bytes(), type=list[str]) if guarded else []
        except (OSError, msgspec.DecodeError):
            scopes = []
        return Unreadable(f"the configuration copy {self._copy} {what}", guarded=guarded, scopes=scopes)
