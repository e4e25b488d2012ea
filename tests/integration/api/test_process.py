"""The API as a process: its start, its refusals, its end."""

import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from megido_api.__main__ import main
from megido_shared.bus.local import Journal
from megido_shared.datadir import DataDir
from megido_shared.testing import a_completed_flow
from tests.integration.api.processes import api, environment, free_port, service
from tests.support.waiting import until

TOKEN = "0123456789abcdef-token"


def get(port: int, path: str, **options: Any) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=30, **options)


def test_bad_configuration_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MEGIDO_API_TOKEN", "MEGIDO_DATABASE_URL", "MEGIDO_DATA_DIR", "MEGIDO_KAFKA"):
        monkeypatch.delenv(name, raising=False)

    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1, said
        return said

    data = ["--data-dir", str(tmp_path)]
    database = ["--database-url", "postgresql://localhost/x", *data]
    assert "MEGIDO_DATABASE_URL" in refused(*data)
    assert "MEGIDO_API_TOKEN" in refused("--host", "0.0.0.0", *database)
    assert "MEGIDO_API_TOKEN" in refused("--host", "::", *database)
    assert "postgresql://" in refused("--database-url", "mysql://x/y", *data)
    assert "--port" in refused("--port", "70000", *database)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in refused("--port", str(taken.getsockname()[1]), *database)
    (tmp_path / "file").write_text("")
    assert "data directory" in refused("--database-url", "postgresql://x/y", "--data-dir", str(tmp_path / "file"))
    monkeypatch.setenv("MEGIDO_API_TOKEN", "short")
    assert "too short" in refused(*database)


def test_a_refusal_and_the_help_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megido_api"]
    done = subprocess.run(
        [*command, "--host", "0.0.0.0"], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    done = subprocess.run([*command, "--help"], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for flag in ("--host", "--port", "--allow-host", "--database-url", "--data-dir", "--kafka"):
        assert flag in done.stdout


def test_one_ready_line_and_nothing_of_the_server(database: str, tmp_path: Path) -> None:
    with api(database, tmp_path) as (started, port):
        started.wait_ready(port)
        until(lambda: "ready on" in started.output(), "the ready line")
        ready = [line for line in started.output().splitlines() if "ready" in line]
        assert ready == [f"megido-api: ready on http://127.0.0.1:{port} (documentation: /docs)"]
        answer = get(port, "/proxy/api/stats/")
        assert "server" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"
        huge = get(port, "/proxy/api/stats/", headers={"X-Huge": "x" * 200_000})
        assert huge.status_code == 400
        assert started.stop()[0] == 0


def test_on_every_address_with_the_token(database: str, tmp_path: Path) -> None:
    arguments = ["--host", "0.0.0.0", "--allow-host", "megido.lan"]
    with api(database, tmp_path, *arguments, env={"MEGIDO_API_TOKEN": TOKEN}) as (started, port):
        started.wait_ready(port)
        assert get(port, "/proxy/api/stats/").status_code == 401
        token = {"Authorization": f"Bearer {TOKEN}"}
        assert get(port, "/proxy/api/stats/", headers=token).status_code == 200
        assert get(port, "/proxy/api/stats/", headers=token | {"Host": "megido.lan"}).status_code == 200
        assert get(port, "/proxy/api/stats/", headers=token | {"Host": "evil.example"}).status_code == 403
        assert TOKEN not in started.output()


def test_kafka_away_keeps_what_is_posted_and_ends_in_time(database: str, tmp_path: Path) -> None:
    with api(database, tmp_path, "--kafka", f"127.0.0.1:{free_port()}") as (started, port):

        def answered() -> bool:
            try:
                return get(port, "/livez").status_code == 200
            except httpx.ConnectError:
                return False

        until(answered, "the API to listen")
        posted = httpx.post(
            f"http://127.0.0.1:{port}/proxy/api/errors/", json={"error_message": "kept"}, trust_env=False, timeout=30
        )
        assert posted.status_code == 201
        assert get(port, "/proxy/api/errors/list/").status_code == 200
        missing = get(port, "/readyz")
        assert missing.status_code == 503
        assert missing.json()["error"]["details"]["missing"][0].startswith("bus: ")
        code, seconds = started.stop(15)
        assert (code, seconds < 15) == (0, True), started.output()
        assert "Traceback" not in started.output()
    with psycopg.connect(database) as admin:
        assert admin.execute("SELECT count(*) FROM outbox").fetchone() == (1,)


def test_stopping_answers_a_waiting_replay(database: str, tmp_path: Path) -> None:
    """Nobody replays here, so a waiting request would go on waiting for half a minute."""
    data = DataDir(tmp_path / "data")
    journal = Journal.open(data, "capture")
    assert journal.publish(a_completed_flow())
    journal.close()
    common = ["--data-dir", str(data.root), "--database-url", database, "--log-dir", str(tmp_path / "logs")]
    with (
        api(database, tmp_path) as (started, port),
        service("megido_ingest", *common, "--metrics-port", "0", log=tmp_path / "ingest.log"),
    ):
        started.wait_ready(port)
        until(lambda: get(port, "/proxy/api/requests/").json()["total"], "the stored flow", seconds=40)
        number = get(port, "/proxy/api/requests/").json()["requests"][0]["id"]
        answers: list[httpx.Response] = []

        def replay() -> None:
            url = f"http://127.0.0.1:{port}/proxy/api/requests/{number}/replay/"
            answers.append(httpx.post(url, trust_env=False, timeout=60))

        waiting = threading.Thread(target=replay)
        waiting.start()

        def queued() -> bool:
            with psycopg.connect(database) as admin:
                return admin.execute("SELECT count(*) FROM replay_jobs").fetchone() == (1,)

        until(queued, "the job")
        code, seconds = started.stop(15)
        waiting.join(20)
        assert (code, seconds < 8) == (0, True), started.output()
        assert [answer.status_code for answer in answers] == [202]
