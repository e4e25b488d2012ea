"""Files: log files by the policy, and what dead nodes left in their journals; and a kill -9 between all steps."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from megido_ingest.failpoints import RETENTION_POINTS
from megido_ingest.retention import Places
from megido_shared.bus.base import Stream
from megido_shared.bus.local import Journal
from megido_shared.bus.local.groups import Group
from megido_shared.datadir import DataDir
from megido_shared.db.connect import conninfo
from tests.integration.ingest.support import rows
from tests.integration.retention.history import History, ask, moment, noted, retention, run_once, set_policy
from tests.unit.test_logfiles import put

TOPIC = "megido.flows"
PROGRAM = """
import asyncio, sys
from pathlib import Path
from megido_ingest.retention import Places, Retention
from megido_shared.clock import SystemClock

async def main(url, root, run):
    async with Retention.opened(url, Places(Path(root)), SystemClock()) as retention:
        await retention.asked(int(run), dry=False)

asyncio.run(main(*sys.argv[1:]))
"""


def write_logs(root: Path, *days_ago: int) -> None:
    for days in days_ago:
        put(root, f"requests/{moment(days):%Y%m%d}/12.ndjson", "x", size=40_000)
        put(root, f"responses/{moment(days):%Y%m%d}/123052_123456_200.json", "x", size=40_000)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def test_log_files_go_by_age_and_by_size(database: str, tmp_path: Path) -> None:
    write_logs(tmp_path, 9, 5, 4, 3)
    set_policy(database, log_days=5)
    dry = await run_once(database, tmp_path, dry=True)
    assert (dry.logs.files, dry.logs.since, dry.days) == (2, f"{moment(9):%Y%m%d}12", [])
    assert len(files(tmp_path)) == 8
    done = await run_once(database, tmp_path)
    assert done.logs == dry.logs
    assert len(files(tmp_path)) == 6
    set_policy(database, log_max_bytes=done.logs.kept_bytes - 1)
    by_size = await run_once(database, tmp_path)
    assert (by_size.logs.files, by_size.logs.until) == (1, f"{moment(5):%Y%m%d}12")
    assert sum(path.lstat().st_blocks * 512 for path in tmp_path.rglob("*.*json")) == by_size.logs.kept_bytes


async def test_what_hinders_one_part_holds_up_no_other(database: str, tmp_path: Path) -> None:
    """A root of log files that is none, and a day that a reader will not let go of."""
    history = History(database)
    for days_ago in (7, 6, 0):
        await history.day(days_ago)
    set_policy(database, days=2, log_days=2)
    root = tmp_path / "logs"
    root.write_text("no folder")
    with psycopg.connect(conninfo(database)) as reader, pytest.MonkeyPatch.context() as patched:
        patched.setattr("megido_ingest.retention.rows._ATTEMPTS", 2)
        leaf = f"flows_{moment(7):%Y%m%d}"
        reader.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.Identifier(leaf)))
        async with retention(database, root) as found:
            report = await found.scheduled()
    assert [day.day for day in report.days] == [moment(6).date().isoformat()]
    assert set(history.days_of()) == {7, 0}
    ((state, error),) = rows(database, "SELECT state, error FROM retention_runs")
    assert state == "failed"
    assert "log files: " in error and moment(7).date().isoformat() in error
    root.unlink()
    write_logs(root, 7)
    assert (await run_once(database, root)).errors == []
    assert (set(history.days_of()), files(root)) == ({0}, [])


async def test_without_a_limit_nothing_goes(database: str, tmp_path: Path) -> None:
    history = History(database)
    await history.day(300)
    write_logs(tmp_path, 300)
    report = await run_once(database, tmp_path)
    assert not report.removes
    assert history.days_of() == {300: 4}
    assert len(files(tmp_path)) == 2


async def test_what_a_dead_node_left_behind_goes_when_every_reader_has_it(database: str, tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data").ensure()
    groups = [Group(data_dir, name) for name in ("ingest", "forwarder")]
    for group in groups:
        group.pin([TOPIC])
    for name in ("dead", "live"):
        journal = Journal.open(data_dir, name, cap_bytes=1 << 20, segment_bytes=64 << 10)
        for _ in range(10):
            journal.append(TOPIC, b"key", bytes(40_000))
        end = journal.used_bytes
        if name == "dead":
            journal.close()
        for group in groups[:1]:
            group.write_ack(Stream(journal.epoch.hex(), TOPIC, 0), end)
    slot = data_dir.bus / "dead-0"
    segments = files(slot)
    places = Places(tmp_path / "logs", data_dir)
    assert (await run_once(database, places)).bus.segments == 0, "the forwarder has read nothing"
    (stream,) = [path.name for path in (data_dir.groups / "ingest" / "acks").iterdir() if _is_of(path.name, slot)]
    groups[1].write_ack(Stream(stream.rpartition(".")[2], TOPIC, 0), end)
    dry = await run_once(database, places, dry=True)
    assert files(slot) == segments
    done = await run_once(database, places)
    assert done.bus == dry.bus
    left = files(slot)
    assert len(segments) - len(left) == done.bus.segments > 0
    assert max(segments) in left, "the newest knows the node's numbers"
    journal.close()


def _is_of(ack: str, slot: Path) -> bool:
    epoch = ack.rpartition(".")[2]
    return any(epoch in path.name for path in slot.iterdir())


@pytest.mark.parametrize("point", RETENTION_POINTS)
async def test_killed_between_two_steps_the_next_run_ends_where_it_would_have(
    database: str, tmp_path: Path, point: str
) -> None:
    history = History(database)
    for days_ago in (7, 6, 0):
        await history.day(days_ago)
    history.age_the_rest(7)
    history.pin(history.flows[7][0])
    write_logs(tmp_path, 7, 0)
    set_policy(database, days=2, log_days=2)
    planned = await run_once(database, tmp_path, dry=True)
    run = ask(database, dry=False)
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, database, str(tmp_path), str(run)],
        env=os.environ | {"MEGIDO_FAILPOINT": point}, timeout=120, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    async with retention(database, tmp_path) as found:
        assert await found.queued() == []
    state, first = noted(database, run)
    assert state == "failed"
    assert first.days == planned.days[: 1 if point == "retention_after_day" else 2], "what went is noted, no more"
    second = await run_once(database, tmp_path)
    assert first.days + second.days == planned.days
    assert history.days_of() == {7: 1, 0: 4}
    assert rows(database, "SELECT count(*) FROM feed") == [(0,)]
    assert len(files(tmp_path)) == 2
