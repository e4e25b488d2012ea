"""Reading and tidying log files, among names that somebody else chose."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

import megido
from megido_shared.logfiles import cleaning, cleanup, recent
from megido_shared.logfiles.folders import Folders, open_folder, open_root
from megido_shared.logfiles.reading import Budget

NOW = datetime(2026, 2, 20, 12, tzinfo=UTC)


def put(root: Path, name: str, *moments: str, size: int = 0) -> Path:
    """A file of the tree, or one of lines."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [json.dumps({"timestamp": moment, "type": "request", "body": "x" * size}) for moment in moments]
    path.write_text("\n".join(entries) + "\n")
    return path


def moments(root: Path, limit: int = 100) -> list[str]:
    return [entry["timestamp"] for entry in recent(root, "requests", limit)]


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A log root with everything in it that is no log, and its neighbours in `tmp_path / "outside"`."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    put(outside, "143052_123456_GET.json", "2020-01-01T00:00:00.000000")
    put(outside, "14.ndjson", "2020-01-01T00:00:00.000000")
    day = root / "requests" / "20260101"
    put(root, "requests/20260101/143052_123456_GET.json", "2026-01-01T14:30:52.123456")
    (day / "143053_000000_GET.json").symlink_to(outside / "143052_123456_GET.json")
    (day / "15.ndjson").symlink_to(outside / "14.ndjson")
    (day / "143054_000000_GET.json").symlink_to("/dev/zero")
    os.mkfifo(day / "143055_000000_GET.json")
    (day / "143056_000000_GET.json").mkdir()
    (day / "README.json").write_text("not ours")
    (root / "requests" / "20260102").symlink_to(outside)
    (root / "responses").symlink_to(outside.parent)
    (root / "websockets").mkdir()
    (root / "websockets" / "ws_1_1").symlink_to(outside)
    (root / "loop").symlink_to(root)
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(day, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{here}/143057_000000_GET.json")
        os.close(here)
        yield root


def test_nothing_is_read_through_a_link_or_from_a_device(hostile: Path) -> None:
    assert moments(hostile) == ["2026-01-01T14:30:52.123456"]
    assert recent(hostile, "responses") == recent(hostile, "websockets") == []


def test_nothing_outside_is_removed_and_nothing_that_is_not_ours(hostile: Path, tmp_path: Path) -> None:
    outside = sorted(os.listdir(tmp_path / "outside"))
    planned = cleaning.plan(hostile, days=1, now=NOW)
    assert {unit.folder for unit in planned.units} == {"requests/20260101"}
    removed = cleaning.remove(hostile, planned.units)
    assert removed.units == planned.units
    assert sorted(os.listdir(tmp_path / "outside")) == outside
    left = os.listdir(hostile / "requests" / "20260101")
    assert sorted(left) == ["143056_000000_GET.json", "README.json"], "links and devices under our names went, as names"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/etc", "a\0b"])
def test_names_of_folders_are_names(tmp_path: Path, name: str) -> None:
    root = open_root(tmp_path)
    with pytest.raises((OSError, ValueError)):
        open_folder(root, name, create=True)
    os.close(root)
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_dots_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for path in ("..", "a/../..", "a/../../b"):
        with pytest.raises(OSError, match="name of a folder"):
            Folders(tmp_path / "root").get(path, create=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["root"]


def test_lines_and_files_of_an_hour_are_merged(tmp_path: Path) -> None:
    put(tmp_path, "requests/20260213/143052_123456_GET.json", "2026-02-13T14:30:52.123456")
    put(tmp_path, "requests/20260213/143054_000000_GET.json", "2026-02-13T14:30:54.000000")
    put(tmp_path, "requests/20260213/14.ndjson", "2026-02-13T14:30:51.000000", "2026-02-13T14:30:53.000000")
    put(tmp_path, "requests/20260213/14-1.ndjson", "2026-02-13T14:59:00.000000")
    put(tmp_path, "requests/20260212/23.ndjson", "2026-02-12T23:00:00.000000")
    found = moments(tmp_path)
    assert found == sorted(found, reverse=True)
    assert len(found) == 6
    assert moments(tmp_path, 3) == found[:3]
    assert moments(tmp_path, 0) == []


def test_lines_longer_than_a_piece_and_a_torn_one(tmp_path: Path) -> None:
    name = "requests/20260213/14.ndjson"
    path = put(tmp_path, name, *(f"2026-02-13T14:00:{n:02d}.000000" for n in range(5)), size=700_000)
    assert len(moments(tmp_path)) == 5
    with path.open("a") as file:
        file.write('{"timestamp": "2026-02-13T15')
    assert len(moments(tmp_path)) == 5
    assert moments(tmp_path, 2) == ["2026-02-13T14:00:04.000000", "2026-02-13T14:00:03.000000"]
    path.write_bytes(b"x" * 3_000_000)
    assert moments(tmp_path) == []


@pytest.mark.parametrize("name", ["14.ndjson", "143052_123456_GET.json"])
def test_nothing_older_is_read_once_the_budget_is_reached(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"requests/20260213/{name}", "2026-02-13T14:00:00.000000", size=9_000)
    put(tmp_path, "requests/20260213/13.ndjson", "2026-02-13T13:00:00.000000")
    put(tmp_path, "requests/20260213/15.ndjson", "2026-02-13T15:00:00.000000")
    enough, small = Budget(20_000), Budget(5_000)
    assert len(recent(tmp_path, "requests", 100, enough)) == 3
    found = recent(tmp_path, "requests", 100, small)
    assert [entry["timestamp"] for entry in found] == ["2026-02-13T15:00:00.000000"]
    assert (enough.truncated, small.truncated) == (False, True)


def test_another_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no kind of log"):
        recent(tmp_path, "..")  # type: ignore[arg-type]


def test_the_oldest_hours_go_until_the_size_fits(tmp_path: Path) -> None:
    for day, hour in (("20260218", "03"), ("20260218", "04"), ("20260219", "10"), ("20260220", "11")):
        put(tmp_path, f"requests/{day}/{hour}.ndjson", "x", size=40_000)
        put(tmp_path, f"team/responses/{day}/{hour}3052_123456_200.json", "x", size=40_000)
    total = sum(unit.bytes for unit in cleaning.measure(tmp_path))
    planned = cleaning.plan(tmp_path, max_bytes=total // 2, now=NOW)
    assert [unit.hour for unit in planned.units] == ["2026021803"] * 2 + ["2026021804"] * 2
    assert planned.kept_bytes == total - planned.bytes <= total // 2
    assert cleaning.remove(tmp_path, planned.units).bytes == planned.bytes
    assert sum(unit.bytes for unit in cleaning.measure(tmp_path)) == planned.kept_bytes
    assert not (tmp_path / "requests" / "20260218").exists(), "empty folders go too"
    all_but_fresh = cleaning.plan(tmp_path, max_bytes=0, now=NOW)
    assert {unit.hour for unit in all_but_fresh.units} == {"2026021910"}, "the last two hours stay"


def test_a_folder_that_cannot_be_read_is_told_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in ("20260101", "20260102"):
        put(tmp_path, f"requests/{day}/143000_000000_GET.json", "x")
    plain = os.listdir

    def listed(folder: int) -> list[str]:
        if os.readlink(f"/proc/self/fd/{folder}").endswith("20260101"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(folder)

    monkeypatch.setattr(os, "listdir", listed)
    found = cleaning.plan(tmp_path, days=1, now=NOW)
    assert [unit.folder for unit in found.units] == ["requests/20260102"]
    assert found.skipped == ("requests/20260101: Permission denied",)


def test_clean_up_twice_at_once(tmp_path: Path) -> None:
    for n in range(20):
        put(tmp_path, f"requests/20260101/1430{n:02d}_000000_GET.json", "x")
    units = cleaning.plan(tmp_path, days=1, now=NOW).units
    assert cleaning.remove(tmp_path, units).files == 20
    assert cleaning.remove(tmp_path, units).files == 0
    assert cleanup(tmp_path / "nothing", 1) == 0


def test_the_founding_documents_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "logs/proxy/requests/20260213/143052_123456_GET.json", "2026-02-13T14:30:52.123456")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROXY_LOG_DIR", raising=False)
    logger = megido.ProxyLogger()
    recent_logs = logger.get_recent_logs("requests", limit=50)
    assert [entry["timestamp"] for entry in recent_logs] == ["2026-02-13T14:30:52.123456"]
    assert logger.cleanup_old_logs(days_to_keep=30) == 1
    assert megido.ProxyLogger("elsewhere").get_recent_logs() == []
    monkeypatch.setenv("PROXY_LOG_DIR", "other")
    put(tmp_path, "other/errors/20260213/14.ndjson", "2026-02-13T14:30:52.123456")
    assert len(megido.ProxyLogger().get_recent_logs("errors")) == 1
