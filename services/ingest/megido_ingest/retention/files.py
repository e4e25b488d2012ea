"""Files: log files by age and size, and what is left of journals that nobody writes any more."""

from pathlib import Path

from megido_shared.bus.local import groups, locks
from megido_shared.bus.local.segments import Name, list_segments
from megido_shared.datadir import DataDir
from megido_shared.logfiles import cleaning
from megido_shared.logfiles.cleaning import Cleanup
from megido_shared.retention import Bus, Logs, Policy


def plan_logs(root: Path, policy: Policy) -> Cleanup:
    """Raises OSError."""
    if not policy.limits_logs:
        return Cleanup((), 0)
    return cleaning.plan(root, days=policy.log_days or None, max_bytes=policy.log_max_bytes or None)


def logs_of(found: Cleanup, kept_bytes: int) -> Logs:
    hours = [unit.hour for unit in found.units]
    return Logs(found.files, found.bytes, kept_bytes, min(hours, default=""), max(hours, default=""))


def plan_bus(data_dir: DataDir) -> dict[Path, list[Name]]:
    """Segments by slot. Never a slot's newest, which knows the node's epoch and numbers; never what a reader that
    counts has still to read. Raises OSError."""
    found: dict[Path, list[Name]] = {}
    for slot in sorted(data_dir.bus.iterdir()) if data_dir.bus.is_dir() else ():
        if slot.is_symlink() or not slot.is_dir() or locks.slot_is_live(slot):
            continue
        streams = list_segments(slot).values()
        names = [name for stream in streams for name in groups.freeable(data_dir, slot, stream)]
        if names:
            found[slot] = names
    return found


def bus_of(found: dict[Path, list[Name]]) -> Bus:
    return Bus(
        sum(len(names) for names in found.values()),
        sum(_size(slot / name.file) for slot, names in found.items() for name in names),
    )


def free_bus(found: dict[Path, list[Name]]) -> None:
    for slot, names in found.items():
        groups.free(slot, names)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0
