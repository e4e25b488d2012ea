"""The journal's append against the alternatives: what it costs, and what a kill -9 and a flipped byte lose.

Every writer says that a record is safe as soon as its append returns; "lost" counts those that a reader does not
find afterwards. See docs/adr/0001-journal-is-a-segmented-log.md.
"""

import argparse
import mmap
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import mean, median

from benchmarks.report import finish, ratio, say
from megido_shared.bus.local import Journal
from megido_shared.bus.local.segments import Entry, Name, list_segments, pack, scan
from megido_shared.datadir import DataDir

TOPIC = "megido.flows"
KEY = bytes(16)
NAME = Name(TOPIC, 0, 0, "00" * 16)
MMAP_BYTES = 256 << 20

type Append = Callable[[bytes, int], object]


@contextmanager
def segment(path: Path) -> Iterator[Append]:
    """Ours: one write a record, fsync in a thread."""
    journal = Journal.open(DataDir(path), "bench", segment_bytes=64 << 20)
    yield lambda value, seq: journal.append(TOPIC, KEY, value, seq)
    journal.close()


@contextmanager
def sqlite(path: Path) -> Iterator[Append]:
    """A row and a commit a record in WAL mode, synchronous=NORMAL (it survives a kill, as ours does)."""
    database = sqlite3.connect(path / "wal.db", isolation_level=None)
    database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=100000;")
    database.execute("CREATE TABLE IF NOT EXISTS records (seq INTEGER PRIMARY KEY, key BLOB, value BLOB)")
    yield lambda value, seq: database.execute("INSERT INTO records VALUES (?, ?, ?)", (seq, KEY, value))
    database.close()


@contextmanager
def buffered(path: Path) -> Iterator[Append]:
    """The same records through a buffer of 64 KB."""
    with (path / "buffered").open("ab", buffering=64 << 10) as file:
        yield lambda value, seq: file.write(pack(NAME.marker, KEY, value, seq))


@contextmanager
def mapped(path: Path) -> Iterator[Append]:
    """The same records copied into a mapped file that was made large beforehand."""
    with (path / "mapped").open("w+b") as file:
        file.truncate(MMAP_BYTES)
        with mmap.mmap(file.fileno(), MMAP_BYTES) as memory:
            yield lambda value, seq: memory.write(pack(NAME.marker, KEY, value, seq))


WRITERS = {"segment": segment, "sqlite": sqlite, "buffered": buffered, "mmap": mapped}


def read(kind: str, path: Path) -> set[int]:
    """The numbers of the records that can still be had."""
    if kind == "sqlite":
        try:
            with sqlite3.connect(path / "wal.db") as database:
                return {row[0] for row in database.execute("SELECT seq FROM records")}
        except sqlite3.DatabaseError:
            return set()
    return {item.seq for data, marker in _files(kind, path) for item in scan(data, marker) if isinstance(item, Entry)}


def _files(kind: str, path: Path) -> list[tuple[bytes, bytes]]:
    if kind == "segment":
        slot = path / "bus" / "bench-0"
        return [((slot / name.file).read_bytes(), name.marker) for name in list_segments(slot)[TOPIC]]
    return [((path / {"mmap": "mapped"}.get(kind, kind)).read_bytes(), NAME.marker)]


def cost(kind: str, appends: int, size: int) -> float:
    """Microseconds an append."""
    value = os.urandom(size)
    with tempfile.TemporaryDirectory(dir=".") as folder, WRITERS[kind](Path(folder)) as append:
        begin = time.perf_counter()
        for seq in range(1, appends + 1):
            append(value, seq)
        return (time.perf_counter() - begin) / appends * 1e6


def lost_to_kill(kind: str, size: int, rng: random.Random) -> int:
    """Records that a killed writer had called safe and that are gone."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, "-m", "benchmarks.journal", "--write", kind, folder, str(size)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout
        told = child.stdout.read(8 * rng.randrange(200, 3000))
        child.kill()
        told += child.stdout.read()
        child.wait()
        child.stdout.close()
        return len({*range(1, len(told) // 8 + 1)} - read(kind, Path(folder)))


def write_for_ever(kind: str, folder: str, size: int) -> None:
    value = os.urandom(size)
    with WRITERS[kind](Path(folder)) as append:
        for seq in count(1):
            append(value, seq)
            os.write(1, seq.to_bytes(8))


def lost_to_flip(kind: str, records: int, size: int, rng: random.Random) -> int:
    """Records that are gone after one byte of what was written was changed."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder)
        command = [sys.executable, "-m", "benchmarks.journal", "--write", kind, folder, str(size)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.read(8 * records)
        child.kill()
        child.communicate()
        copy = path / "copy"
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*-shm", "lock", "copy"))
        whole = read(kind, copy)
        shutil.rmtree(copy)
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("*-shm", "lock", "copy"))
        largest = max((file for file in copy.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        with largest.open("r+b") as file:
            at = rng.randrange(len(whole) * size)
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 0x10]))
        return len(whole - read(kind, copy))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="appends a round (default 10000)")
    parser.add_argument("--size", type=int, default=3_000, help="bytes a record (default 3000)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of every kind, interleaved (default 7)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_for_ever(options.write[0], options.write[1], int(options.write[2]))
    rng = random.Random(options.seed)
    costs: dict[str, list[float]] = {kind: [] for kind in WRITERS}
    killed: dict[str, list[int]] = {kind: [] for kind in WRITERS}
    flipped: dict[str, list[int]] = {kind: [] for kind in WRITERS}
    for number in range(options.rounds):
        for kind in WRITERS:
            costs[kind].append(cost(kind, options.count, options.size))
            killed[kind].append(lost_to_kill(kind, options.size, rng))
            flipped[kind].append(lost_to_flip(kind, 1000, options.size, rng))
            say(
                f"round {number + 1}: {kind} {costs[kind][-1]:.1f} µs, lost to a kill {killed[kind][-1]}, "
                f"to a flipped byte {flipped[kind][-1]}"
            )
    figures: dict[str, object] = {f"{kind}_us": round(median(values), 2) for kind, values in costs.items()}
    figures["sqlite_ratio"] = ratio(costs["sqlite"], costs["segment"])
    figures |= {f"{kind}_lost_to_kill": round(mean(values), 1) for kind, values in killed.items()}
    figures |= {f"{kind}_lost_to_flip": round(mean(values), 1) for kind, values in flipped.items()}
    detail = {"us": costs, "lost_to_kill": killed, "lost_to_flip": flipped, "options": vars(options)}
    finish("journal", figures, detail=detail, packages=("google-crc32c", "msgspec"))


if __name__ == "__main__":
    main()
