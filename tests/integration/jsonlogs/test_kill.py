"""kill -9 of the writer, again and again: every flow ends with one entry of its own, whole, in both layouts."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from megido_ingest.failpoints import LOGS_POINTS
from tests.integration.jsonlogs.rows import MOMENT, Store
from tests.support.waiting import until

PROGRAM = """
import asyncio, sys
from pathlib import Path
from megido_ingest.jsonlogs import JsonLogWriter
asyncio.run(JsonLogWriter(sys.argv[1], Path(sys.argv[2]), sys.argv[3]).run(asyncio.Event()))
"""
pytestmark = pytest.mark.timeout(300)
BATCH, BATCHES, KILLS = 50, 4, 6
FLOWS = KILLS * BATCHES * BATCH


@pytest.mark.parametrize("layout", ["tree", "ndjson"])
def test_kills_lose_and_double_nothing(database: str, tmp_path: Path, layout: str) -> None:
    store, root = Store(database), tmp_path / "logs"
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    body = bytes(chance.randrange(32, 127) for _ in range(4000))
    stored = []
    for kill in range(KILLS):
        for _ in range(BATCHES):
            # Five flows share each microsecond: names collide all the time.
            first = len(stored)
            batch = [
                {"started_at": MOMENT + timedelta(microseconds=n // 5), "request_body": body}
                for n in range(first, first + BATCH)
            ]
            stored += store.flows(batch)
        if kill % 2:
            # Each flow has two entries, so however fast the last writer was, there are enough to come.
            enough = _count(root) + chance.randrange(20, BATCHES * BATCH)
            _run_until(lambda enough=enough: _count(root) >= enough, database, root, layout)
        else:
            # A writer may have done all before anybody sees a part of it: these kill it for certain.
            point = LOGS_POINTS[kill // 2 % len(LOGS_POINTS)]
            _run_to(point, database, root, layout)
            assert _done(store, store.last_seq()) is (point == "logs_after_commit"), f"seed {seed}"
    _run_until(lambda: _done(store, store.last_seq()), database, root, layout)

    for kind in ("requests", "responses"):
        files = [path for path in (root / kind).rglob("*") if path.is_file()]
        entries = [json.loads(one) for path in files for one in _entries(path)]
        owners = [entry["flow_id"] for entry in entries]
        assert len(owners) == FLOWS, f"seed {seed}"
        assert set(owners) == {flow_id.hex for flow_id in stored}, f"seed {seed}"


def _run_until(condition: Callable[[], bool], database: str, root: Path, layout: str) -> None:
    """Starts a writer and kills it when the condition holds."""
    writer = subprocess.Popen([sys.executable, "-c", PROGRAM, database, str(root), layout])
    try:
        until(condition, "files are written", seconds=60, every=0.005)
    finally:
        writer.kill()
        writer.wait()


def _run_to(point: str, database: str, root: Path, layout: str) -> None:
    """Starts a writer that is killed when it gets there."""
    command = [sys.executable, "-c", PROGRAM, database, str(root), layout]
    killed = subprocess.run(command, env=os.environ | {"MEGIDO_FAILPOINT": point}, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL


def _entries(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return content.splitlines() if path.suffix == ".ndjson" else [content]


def _count(root: Path) -> int:
    lines = sum(path.read_bytes().count(b"\n") for path in root.rglob("*.ndjson"))
    return lines + sum(1 for path in root.rglob("*.json"))


def _done(store: Store, target: int) -> bool:
    return next(iter(store.cursors().values()), 0) >= target
