"""The log tree on its own: nobody reads half a file, with and without O_TMPFILE."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megido_ingest.jsonlogs.entries import Entry
from megido_ingest.jsonlogs.tree import LogTree


def entry(number: int, owner: str = "", size: int = 200_000) -> Entry:
    owner = owner or f"{number:032x}"
    fields = {"type": "request", "flow_id": owner, "body": "x" * size}
    return Entry("requests/20260213", f"{number:06d}", "flow_id", owner, fields)


@pytest.fixture
def without_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call fails as it does on a file system that cannot do it (NFS, some overlays)."""
    plain = os.open

    def refusing(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return plain(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen_while_writing = os.write, []

    def looking(descriptor: int, data: Any) -> int:
        seen_while_writing.append([path.name for path in tmp_path.rglob("*.json")])
        return write(descriptor, data[:1000])  # a disk may take less than it was given

    monkeypatch.setattr(os, "write", looking)
    LogTree(tmp_path).write(entry(1, size=5_000))
    assert len(seen_while_writing) > 3
    assert all(names == [] for names in seen_while_writing)
    assert json.loads((tmp_path / "requests" / "20260213" / "000001.json").read_bytes()) == entry(1, size=5_000).fields


def same_outcome(root: Path) -> None:
    tree = LogTree(root)
    first, other = entry(1, owner="a" * 32, size=10), entry(1, owner="b" * 32, size=10)
    for _ in range(2):
        tree.write(first)
        tree.write(other)
    folder = root / "requests" / "20260213"
    assert sorted(path.name for path in folder.iterdir()) == ["000001-bbbbbb.json", "000001.json"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    changed = entry(1, owner="a" * 32, size=20)
    tree.write(changed)
    assert json.loads((folder / "000001.json").read_bytes()) == changed.fields
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    tree.write(first)
    assert json.loads((folder / "000001.json").read_bytes()) == first.fields


def test_names_collisions_and_changes(tmp_path: Path) -> None:
    same_outcome(tmp_path)


@pytest.mark.usefixtures("without_nameless_files")
def test_the_same_where_files_need_a_name_from_the_start(tmp_path: Path) -> None:
    same_outcome(tmp_path)
