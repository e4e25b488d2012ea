"""The embedded Postgres: start, stop, what a crash leaves behind, and the errors that a person meets."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from megido_shared.datadir import DataDir
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.postgres_binaries import BIN_VARIABLE, choose, inspect, system_bins, wheel_bin
from megido_shared.errors import ConfigurationError


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def modes() -> list[str]:
    return ["userns", "caps"] if os.geteuid() == 0 else ["plain"]


def write(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
        connection.execute("INSERT INTO kept VALUES (1)")


def count(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM kept").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("mode", modes())
def test_starts_stops_and_keeps_what_was_written(tmp_path: Path, mode: str) -> None:
    data_dir = DataDir(tmp_path / "data")
    server = EmbeddedPostgres(data_dir, durable=False, modes=(mode,))
    write(server.start())
    pid = server.pid
    assert pid is not None
    assert os.getsid(pid) == pid, "a terminal's Ctrl-C must not reach it"
    server.stop()
    assert not server.running
    assert not Path(f"/proc/{pid}").exists()
    again = EmbeddedPostgres(data_dir, durable=False, modes=(mode,))
    try:
        assert count(again.start()) == 1
    finally:
        again.stop()


def test_data_of_one_way_to_run_as_root_opens_in_the_other(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    for number, mode in enumerate(modes() + modes()[:1], start=1):
        server = EmbeddedPostgres(data_dir, durable=False, modes=(mode,))
        url = server.start()
        try:
            write(url)
            assert count(url) == number
        finally:
            server.stop()


def test_listens_on_no_tcp_port_and_speaks_utf8_in_the_c_locale(embedded_server) -> None:
    with psycopg.connect(embedded_server.admin_url) as connection:
        row = connection.execute(
            "SELECT current_setting('listen_addresses'), current_setting('server_encoding'), datcollate"
            " FROM pg_database WHERE datname = current_database()"
        ).fetchone()
    assert row == ("", "UTF8", "C")


def test_a_killed_postmaster_is_recovered_from(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    server = EmbeddedPostgres(data_dir)
    write(server.start())
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not server.running)
    try:
        assert count(server.start()) == 1
    finally:
        server.stop()


def test_a_pid_file_with_another_process_s_pid_is_no_obstacle(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    server = EmbeddedPostgres(data_dir, durable=False)
    server.start()
    server.stop()
    (cluster,) = data_dir.postgres.glob("pg*")
    (cluster / "postmaster.pid").write_text(f"{os.getpid()}\n{cluster}\n1\n5432\n\n\n\n\n")
    try:
        server.start()
    finally:
        server.stop()


def test_it_ends_with_its_owner_and_the_next_start_works(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from megido_shared.datadir import DataDir;"
            "from megido_shared.db.embedded import EmbeddedPostgres;"
            "s = EmbeddedPostgres(DataDir(pathlib.Path(sys.argv[1])), durable=False);"
            "s.start(); print(s.pid, flush=True); sys.stdin.read()",
            str(data_dir.root),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None and owner.stdin is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    owner.stdin.close()
    until(lambda: not Path(f"/proc/{pid}").exists())
    server = EmbeddedPostgres(data_dir, durable=False)
    try:
        server.start()
    finally:
        server.stop()


def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    server = EmbeddedPostgres(data_dir, durable=False)
    server.start()
    try:
        with pytest.raises(ConfigurationError, match="in use by another megido"):
            EmbeddedPostgres(data_dir, durable=False).start()
        assert server.running
    finally:
        server.stop()


def test_a_long_data_directory_gets_a_short_socket(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / ("long" * 30) / "data")
    server = EmbeddedPostgres(data_dir, durable=False)
    try:
        write(server.start())
    finally:
        server.stop()


def test_an_interrupted_initdb_leaves_nothing_that_is_taken_for_a_cluster(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    server = EmbeddedPostgres(data_dir, durable=False)
    half = data_dir.postgres / f"pg{server.find().major}.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("0\n")
    try:
        write(server.start())
    finally:
        server.stop()


def test_missing_programs_are_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    env = {BIN_VARIABLE: str(tmp_path / "nowhere")}
    with pytest.raises(ConfigurationError) as caught:
        EmbeddedPostgres(DataDir(tmp_path / "data"), env=env).start()
    assert "no Postgres 15 or newer" in str(caught.value)
    assert "--database-url" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_a_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        EmbeddedPostgres(DataDir(tmp_path / "file" / "data")).start()


def test_a_start_that_fails_shows_postgres_own_reason(tmp_path: Path) -> None:
    server = EmbeddedPostgres(DataDir(tmp_path / "data"), durable=False, settings={"shared_buffers": "nonsense"})
    with pytest.raises(ConfigurationError, match="shared_buffers"):
        server.start()
    assert not server.running


def test_existing_data_decides_which_postgres_runs(tmp_path: Path) -> None:
    (system, *_) = system_bins()
    older = inspect(system)
    wheel = wheel_bin()
    assert older is not None and wheel is not None
    assert choose(tmp_path, os.environ).bin_dir == wheel.resolve()
    (tmp_path / f"pg{older.major}").mkdir()
    (tmp_path / f"pg{older.major}" / "PG_VERSION").write_text(f"{older.major}\n")
    assert choose(tmp_path, os.environ).major == older.major


def test_data_of_a_version_that_is_not_here_is_refused_rather_than_hidden(tmp_path: Path) -> None:
    (tmp_path / "pg99").mkdir()
    (tmp_path / "pg99" / "PG_VERSION").write_text("99\n")
    with pytest.raises(ConfigurationError, match="made by Postgres 99"):
        choose(tmp_path, os.environ)


def test_the_fixtures_give_fresh_databases(database: str, empty_database: str, any_database: str) -> None:
    for url in (database, empty_database, any_database):
        write(url)
        assert count(url) == 1
