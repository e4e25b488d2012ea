"""`log_directory` moves the log files while they are written, and never out of the root of the start."""

import json
import stat
from pathlib import Path

import psycopg
import pytest

from megido_shared.db.connect import conninfo
from megido_shared.logfiles import below
from tests.integration.jsonlogs.rows import Store
from tests.integration.jsonlogs.running import files, until, writing


def configure(store: Store, directory: str | None) -> None:
    settings = json.dumps({} if directory is None else {"log_directory": directory})
    with psycopg.connect(conninfo(store.url), autocommit=True) as connection:
        connection.execute(
            "INSERT INTO config_snapshots VALUES ('global', 1, %s, now())"
            " ON CONFLICT (scope) DO UPDATE SET settings = excluded.settings",
            [settings],
        )


async def test_files_follow_the_configuration_while_they_are_written(database: str, tmp_path: Path) -> None:
    store, root = Store(database), tmp_path / "logs" / "proxy"
    outside = tmp_path / "outside"
    outside.mkdir()
    async with writing(store, root) as writer:
        store.flow(url="https://api.example.com/first")
        await until(lambda: len(files(root)) == 2)
        (root / "link").symlink_to(outside)

        configure(store, "team/scanner")
        await until(lambda: writer.directory.path == root / "team" / "scanner")
        store.flow(url="https://api.example.com/second")
        await until(lambda: len(files(root / "team")) == 2)
        for folder in (root / "team", root / "team" / "scanner"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

        for refused in ("/etc", "link", "link/x", str(outside)):
            configure(store, refused)
            await until(lambda refused=refused: repr(refused) in writer.directory.refused)
        store.flow(url="https://api.example.com/third")
        await until(lambda: len(files(root / "team")) == 4)

        configure(store, "logs/proxy")
        await until(lambda: writer.directory.path == root)
        store.flow(url="https://api.example.com/fourth")
        await until(lambda: len(files(root)) == 8)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("wanted", "found"), [("", "."), ("logs/proxy", "."), ("a", "a"), ("a/./b", "a/b"), ("{root}/a", "a")]
)
def test_what_lies_below_the_root(tmp_path: Path, wanted: str, found: str) -> None:
    assert below(tmp_path, wanted.format(root=tmp_path)) == (tmp_path / found)


@pytest.mark.parametrize("wanted", ["..", "a/../..", "/", "/tmp/other", "a/../b"])
def test_what_does_not(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(ValueError, match="log_directory"):
        below(tmp_path, wanted)
