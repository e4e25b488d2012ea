"""The configuration that a node applied last, on disk: for a start while bus and API are away.

Beside each copy there may be a mark, a file that says that the configuration decided on who may use the proxy, and by
which scopes. It is made before such a copy is written and removed only after one without it was, so that a copy that
cannot be read never opens what was closed: one that is damaged, or that another version wrote in a form of its own.

The first line of a copy is the checksum of the rest, and the number of its form. The first two had no number: a list of
snapshots, and a `Copy`.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from megido_shared.bus.local.files import make_dir, replace
from megido_shared.config import Snapshot

FORM = b"2"

logger = logging.getLogger(__name__)


class Copy(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What has other fields is something else, and not a copy that says nothing. `refused`: all that was published
    last, when that could not be applied whole; what it restricts was in force."""

    applied: list[Snapshot] = []
    refused: list[Snapshot] = []


_decoder = msgspec.json.Decoder(Copy)
_first_form = msgspec.json.Decoder(list[Snapshot])


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
        """Empty without a copy. Raises Unreadable; the file is then set aside."""
        guarded = self._mark.exists()
        try:
            return _read(self._copy.read_bytes())
        except FileNotFoundError:
            if guarded:
                raise self._unreadable("is gone", guarded=True) from None
            return Copy()
        except OSError as error:
            raise self._unreadable(f"cannot be read: {error}", guarded=guarded) from error
        except ValueError as error:  # msgspec's are, too
            where = self._set_aside()
            raise self._unreadable(f"cannot be read: {error}{where}", guarded=guarded) from error

    def _set_aside(self) -> str:
        """For whoever wants to know what it was; where it is now."""
        aside = self._copy.with_name(f"{self._copy.name}.unreadable")
        try:
            self._copy.replace(aside)
        except OSError as error:
            logger.warning("%s cannot be set aside: %s", self._copy, error)
            return ""
        return f" (it is {aside.name} now)"

    def save(self, copy: Copy, *, guarded: bool) -> None:
        """Atomically, and synced. Raises OSError."""
        make_dir(self._copy.parent)
        raw = msgspec.json.encode(copy)
        if guarded:
            scopes = sorted({snapshot.scope for snapshot in (*copy.applied, *copy.refused)})
            replace(self._mark, msgspec.json.encode(scopes), sync=True)
        replace(self._copy, b"%s %s\n%s" % (hashlib.sha256(raw).hexdigest().encode(), FORM, raw), sync=True)
        if not guarded:
            self._mark.unlink(missing_ok=True)

    def _unreadable(self, what: str, *, guarded: bool) -> Unreadable:
        try:
            scopes = msgspec.json.decode(self._mark.read_bytes(), type=list[str]) if guarded else []
        except (OSError, msgspec.DecodeError):
            scopes = []
        return Unreadable(f"the configuration copy {self._copy} {what}", guarded=guarded, scopes=scopes)


def _read(content: bytes) -> Copy:
    """Raises ValueError."""
    head, _, raw = content.partition(b"\n")
    digest, _, form = head.partition(b" ")
    if hashlib.sha256(raw).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong, or another version of Megido wrote it")
    if form not in (b"", FORM):
        raise ValueError(f"another version of Megido wrote it (form {form[:20].decode(errors='replace')})")
    try:
        return Copy(applied=_first_form.decode(raw)) if raw.startswith(b"[") else _decoder.decode(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
