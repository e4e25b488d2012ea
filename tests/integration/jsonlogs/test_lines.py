"""The hourly layout: one line an entry, exactly once, whatever stops the writer and when."""

import asyncio
import json
import os
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megido_ingest.jsonlogs import JsonLogWriter, LogLayout
from megido_ingest.jsonlogs.lines import ROUND, HourlyLines
from megido_shared import events, ids
from megido_shared.db import tables
from megido_shared.logfiles import recent
from tests.integration.jsonlogs.rows import MOMENT, Store, a_message, an_attempt, an_error
from tests.integration.jsonlogs.running import files, until, write_all, writing
from tests.integration.jsonlogs.test_place import configure

REQUESTS, RESPONSES = "requests/20260213/14.ndjson", "responses/20260213/14.ndjson"


def lines(root: Path, name: str = REQUESTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


def owners(root: Path, name: str = REQUESTS) -> list[str]:
    return [entry["flow_id"] for entry in lines(root, name)]


async def test_every_kind_has_a_file_an_hour(store: Store, root: Path) -> None:
    flow_id = store.flow(request_body=b"a\r\nb\n", method="../POST")
    store.flow(started_at=MOMENT + timedelta(hours=1))
    store.row(tables.websocket_messages, **a_message(flow_id, connection_id="../../x"))
    store.row(tables.errors, **an_error())
    store.row(tables.auth_attempts, **an_attempt())
    await write_all(store, root, "ndjson")
    assert files(root) == [
        ROUND,
        "auth/20260213/14.ndjson",
        "errors/20260213/14.ndjson",
        "proxy_general.log",
        REQUESTS,
        "requests/20260213/15.ndjson",
        RESPONSES,
        "responses/20260213/15.ndjson",
        "websockets/20260213/14.ndjson",
    ]
    (request,) = lines(root)
    assert (request["type"], request["id"], request["body"]) == ("request", 1, "a\r\nb\n")
    assert request["url"] == "https://api.example.com/users"
    assert lines(root, "websockets/20260213/14.ndjson")[0]["connection_id"] == "../../x"
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_a_flow_has_its_line_when_it_has_ended(store: Store, root: Path) -> None:
    flow_id = store.flow(rank=events.Rank.STARTED)
    await write_all(store, root, "ndjson")
    assert files(root) == []
    store.flow(flow_id=flow_id, rank=events.Rank.COMPLETED)
    await write_all(store, root, "ndjson")
    assert owners(root) == owners(root, RESPONSES) == [flow_id.hex]


async def test_a_round_that_was_not_committed_is_written_once(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind the files and before the position: what a kill does there, at each of both writes."""
    first = store.flow()
    await write_all(store, root, "ndjson")
    more = store.flows([{}, {}])
    for stopped_in in ("_append", "committed"):
        with monkeypatch.context() as patch:
            patch.setattr("megido_ingest.jsonlogs.writer.feed.advance", _broken)
            if stopped_in == "_append":
                patch.setattr("megido_ingest.jsonlogs.lines._append", _half)
            writer = JsonLogWriter(store.url, root, "ndjson")
            with pytest.raises(RuntimeError):
                await asyncio.wait_for(writer.run(asyncio.Event()), 20)
        size = (root / REQUESTS).stat().st_size
        assert size > len((root / REQUESTS).read_bytes().split(b"\n")[0]) + 1, "it did write"
    await write_all(store, root, "ndjson")
    for name in (REQUESTS, RESPONSES):
        assert owners(root, name) == [first.hex, *(flow.hex for flow in more)]
    assert (root / ROUND).read_bytes() == b""


async def _broken(*_: object) -> None:
    raise RuntimeError("killed here")


def _half(file: Any, content: bytearray) -> None:
    os.write(file.descriptor, bytes(content[: len(content) // 2]))
    raise RuntimeError("killed here")


async def test_the_other_layout_takes_over_where_this_one_was(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow_id = store.flow()
    with monkeypatch.context() as patch:
        patch.setattr("megido_ingest.jsonlogs.writer.feed.advance", _broken)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(JsonLogWriter(store.url, root, "ndjson").run(asyncio.Event()), 20)
    await write_all(store, root, "tree")
    assert lines(root) == [], "taken back, it is in the tree"
    assert [entry["flow_id"] for entry in recent(root, "requests")] == [flow_id.hex]
    later = store.flow(started_at=MOMENT + timedelta(minutes=1))
    await write_all(store, root, "ndjson")
    assert [entry["flow_id"] for entry in recent(root, "requests")] == [later.hex, flow_id.hex]


async def test_off_writes_nothing_and_on_again_what_was_missed(store: Store, root: Path) -> None:
    flow_id = store.flow()
    async with writing(store, root, "off"):
        await asyncio.sleep(0)
    assert not root.exists()
    await write_all(store, root, "ndjson")
    assert owners(root) == [flow_id.hex]


async def test_a_torn_line_of_anybody_is_cut(store: Store, root: Path) -> None:
    store.flow()
    await write_all(store, root, "ndjson")
    whole = (root / REQUESTS).read_bytes()
    (root / REQUESTS).write_bytes(whole + b'{"timestamp": "2026-02-13T14:3')
    assert len(recent(root, "requests")) == 1
    store.flow()
    await write_all(store, root, "ndjson")
    assert (root / REQUESTS).read_bytes().startswith(whole)
    assert len(lines(root)) == 2


async def test_files_that_are_removed_while_they_are_written_come_anew(store: Store, root: Path) -> None:
    async with writing(store, root, "ndjson") as writer:
        for number, gone in enumerate((None, root / REQUESTS, root / "requests", root)):
            if gone is not None:
                os.rename(gone, gone.with_name(f"{gone.name}-gone-{number}"))
                for path in gone.parent.rglob("*-gone-*/**/*.ndjson"):
                    path.unlink()
                for path in gone.parent.glob("*.ndjson-gone-*"):
                    path.unlink()
                for path in sorted(gone.parent.rglob("*-gone-*/**/*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                for path in gone.parent.glob("*-gone-*"):
                    path.rmdir()
            flow_id = store.flow()
            last = store.last_seq()
            await until(lambda last=last: writer.position >= last)
            assert owners(root)[-1] == flow_id.hex
            assert len(owners(root)) == 1


async def test_hostile_names_are_not_written_through(store: Store, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_bytes(b"mine")
    day = root / "requests" / "20260213"
    day.mkdir(parents=True)
    (day / "14.ndjson").symlink_to(victim)
    os.mkfifo(day / "14-1.ndjson")
    (day / "14-2.ndjson").mkdir()
    os.link(victim, day / "14-3.ndjson")
    (day / "14-4.ndjson").symlink_to("/dev/null")
    flow_id = store.flow()
    await write_all(store, root, "ndjson")
    assert owners(root, "requests/20260213/14-5.ndjson") == [flow_id.hex]
    assert victim.read_bytes() == b"mine"
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert [entry["flow_id"] for entry in recent(root, "requests")] == [flow_id.hex]


@pytest.mark.parametrize("layout", ["tree", "ndjson"])
@pytest.mark.parametrize("place", ["requests", "requests/20260213", "team/requests"])
async def test_a_folder_that_is_a_link_is_no_folder(
    store: Store, root: Path, tmp_path: Path, place: str, layout: LogLayout, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / place).parent.mkdir(parents=True)
    (root / place).symlink_to(outside)
    if place.startswith("team/"):
        configure(store, "team")
    store.flow(started_at=MOMENT)
    async with writing(store, root, layout) as writer:
        await until(lambda: "JSON logs in" in caplog.text)
        (root / place).unlink()
        await until(lambda: writer.position >= 1)
    assert list(outside.iterdir()) == []


def test_lines_are_written_when_there_are_many(tmp_path: Path) -> None:
    """A round need not fit into memory."""
    from megido_ingest.jsonlogs.entries import Entry

    files = HourlyLines(tmp_path)
    files.begin(0, 1)
    fields = {"timestamp": "2026-02-13T14:30:52.123456", "type": "request", "body": "x" * 100_000}
    for _ in range(12):
        files.write(Entry("requests/20260213", "x", "flow_id", ids.new_id().hex(), fields))
    assert (tmp_path / REQUESTS).stat().st_size > 1_000_000
    files.resume(0)
    assert (tmp_path / REQUESTS).stat().st_size == 0
