"""What the journals of a data directory hold that has not been stored: counted in the records themselves, so that it
is no figure of those whose work it checks."""

from collections.abc import Mapping
from pathlib import Path

from megido_shared.bus.base import Backlog, Stream
from megido_shared.bus.local.discovery import Discovery, Found
from megido_shared.bus.local.segments import Name, next_boundary, parse_one
from megido_shared.bus.topics import INGESTED


def backlog(bus: Path, positions: Mapping[Stream, int], read_bytes: int) -> dict[Stream, Backlog]:
    """`Bus.backlog` below one bus directory. Raises OSError."""
    discovery = Discovery(bus, [topic.name for topic in INGESTED])
    discovery.look()
    found = {}
    for stream, where in sorted(discovery.streams.items()):
        held = _held(where, positions.get(stream, 0), read_bytes)
        read_bytes -= held.behind
        found[stream] = held
    return found


def _held(where: Found, position: int, read_bytes: int) -> Backlog:
    """Not counted: a segment that was freed meanwhile, or before it was read, and what is more than may be read."""
    try:
        sizes = [(name, (where.slot / name.file).stat().st_size) for name in where.names]
        behind = max(0, sum(sizes[-1][1:]) + sizes[-1][0].base - position)
        if position < where.names[0].base or behind > read_bytes:
            return Backlog(behind, counted=None)
        seqs = [
            seq
            for name, size in sizes
            if name.base + size > position
            for seq in _seqs(where.slot, name, max(0, position - name.base))
        ]
    except FileNotFoundError:
        return Backlog(0, counted=None)
    return Backlog(behind, len(seqs), max(seqs, default=0))


def _seqs(slot: Path, name: Name, at: int) -> list[int]:
    """Of the terminal records from `at` on. What is damaged is none: it will be a gap, counted as such."""
    data = (slot / name.file).read_bytes()
    seqs = []
    while 0 <= at < len(data):
        if entry := parse_one(data, at, name.marker):
            at = entry.end
            if entry.seq:
                seqs.append(entry.seq)
        else:
            at = next_boundary(data, at, name.marker, live=True)
    return seqs
