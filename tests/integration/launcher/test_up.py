"""`megido up` with the real processes: what a person sees, what a kill leaves, what a restart finds."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from scripts.kafka import Node

from megido.launcher.options import UpOptions
from megido_shared.db.postgres_binaries import BIN_VARIABLE
from megido_shared.errors import ConfigurationError
from tests.e2e.stack import MEGIDO, Stack, clean_environment, free_port
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(300)
"""A start takes 5 s when nothing else runs."""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    stack.kill()
    until(lambda: not processes(stack), "everything has ended", seconds=40)


@pytest.fixture
def site() -> Iterator[str]:
    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One that several tests look at and leave as it is."""
    stack = Stack(tmp_path_factory.mktemp("running"))
    try:
        stack.start()
        yield stack
        assert stack.stop() == 0, stack.screen()
    finally:
        stack.kill()


def through_proxy(stack: Stack, url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": stack.proxy}))
    with opener.open(url, timeout=20) as answer:
        body: bytes = answer.read()
    return body


def processes(stack: Stack) -> dict[int, str]:
    """Every process that names this stack's data directory, by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(stack.data_dir) in command and int(entry.name) != os.getpid():
                found[int(entry.name)] = command
    return found


def pid_of(stack: Stack, what: str) -> int:
    (pid,) = [pid for pid, command in processes(stack).items() if what in command]
    return pid


def run_up(tmp_path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """An `up` that is expected to refuse."""
    command = [MEGIDO, "up", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=clean_environment() | environment
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("megido: ")
    return line


@pytest.mark.parametrize(("flag", "what"), [("--proxy-port", "the proxy"), ("--api-port", "the API")])
def test_a_taken_port_is_one_line(tmp_path: Path, flag: str, what: str) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = {"--proxy-port", "--api-port"} - {flag}
        done = run_up(tmp_path, "--data-dir", tmp_path / "d", flag, port, other.pop(), free_port())
    assert f"port {port} for {what} is in use" in refused(done)
    assert flag in done.stderr
    assert not (tmp_path / "d" / "postgres").exists()


def test_a_data_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_up(tmp_path, "--data-dir", tmp_path / "file" / "d")
    assert "cannot be written" in refused(done)
    assert "--data-dir" in done.stderr


def test_a_log_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ports = ("--proxy-port", free_port(), "--api-port", free_port())
    done = run_up(tmp_path, "--data-dir", tmp_path / "d", *ports, "--log-dir", tmp_path / "file" / "logs")
    assert "cannot be written" in refused(done)
    assert "--log-dir" in done.stderr


def test_a_kafka_that_is_away_is_one_line(stack: Stack, empty_database: str) -> None:
    ports = ("--proxy-port", stack.proxy_port, "--api-port", stack.api_port)
    nobody = f"127.0.0.1:{free_port()}"
    done = run_up(stack.root, "--data-dir", stack.data_dir, *ports, "--kafka", nobody, "--database-url", empty_database)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("megido: Kafka") and nobody in line
    assert not processes(stack)


def test_missing_postgres_programs_are_one_line(tmp_path: Path) -> None:
    ports = ("--proxy-port", free_port(), "--api-port", free_port())
    done = run_up(tmp_path, "--data-dir", tmp_path / "d", *ports, **{BIN_VARIABLE: str(tmp_path)})
    assert "no Postgres 15 or newer" in refused(done)
    assert "--database-url" in done.stderr


def test_a_service_s_own_refusal_is_shown(stack: Stack) -> None:
    ports = ("--proxy-port", stack.proxy_port, "--api-port", stack.api_port)
    done = run_up(stack.root, "--data-dir", stack.data_dir, *ports, "--auth-required")
    assert done.returncode == 2
    assert "capture cannot start: auth_required is set but there is nothing to compare with" in done.stderr
    assert not processes(stack)


def test_an_option_that_nobody_knows_is_named(stack: Stack) -> None:
    ports = ("--proxy-port", stack.proxy_port, "--api-port", stack.api_port)
    done = run_up(stack.root, "--data-dir", stack.data_dir, *ports, "--prxy-port", "1")
    assert done.returncode == 2
    assert "--prxy-port" in done.stderr
    assert not processes(stack)


def test_ready_stopped_and_started_again_with_its_history(stack: Stack, site: str) -> None:
    stack.start()
    assert stack.ready_s < 30, "10 s on an idle machine"
    screen = stack.screen()
    for expected in (stack.proxy, stack.api, str(stack.ca), str(stack.log_dir), str(stack.data_dir), "curl --proxy"):
        assert expected in screen
    assert stack.ca.exists()
    assert through_proxy(stack, f"{site}/kept") == b"hello"
    stack.wait_for("/kept")
    running = processes(stack)
    assert stack.process is not None
    for pid, command in running.items():
        if (pid != stack.process.pid and " -D " in command) or "launcher.child" in command:
            assert os.getsid(pid) == pid, f"a terminal's Ctrl-C would reach {command}"

    # What comes in the last moment is stored before anything that stores it is stopped.
    through_proxy(stack, f"{site}/last")
    assert stack.stop() == 0
    assert not processes(stack)
    assert len(stack.log_files("responses")) == 2
    general = (stack.log_dir / "proxy_general.log").read_text()
    assert "capture-0" in general and "stopped" in general

    stack.start()
    assert {request["url"] for request in stack.requests("")} == {f"{site}/kept", f"{site}/last"}
    assert stack.stop() == 0


def test_a_child_that_is_killed_comes_back(stack: Stack, site: str) -> None:
    stack.start()
    for what in ("megido_capture", "megido_ingest", "megido_api", "megido_replayer", "postgres -D"):
        pid = pid_of(stack, what)
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid, what=what: _another(stack, what, pid), f"{what} runs again", seconds=30)
    until(lambda: stack.get("/readyz", expect=(200, 503))[0] == 200, "the API is ready", seconds=30)
    until(lambda: _answers(stack, f"{site}/again"), "the proxy is back", seconds=30)
    until(lambda: stack.requests("/again"), "its flow is stored", seconds=30)
    assert "capture ended (killed by signal 9); starting it again" in stack.screen()
    assert stack.stop() == 0
    assert not processes(stack)


def _another(stack: Stack, what: str, before: int) -> bool:
    return any(what in command for pid, command in processes(stack).items() if pid != before)


def _answers(stack: Stack, url: str) -> bool:
    try:
        return through_proxy(stack, url) == b"hello"
    except OSError:
        return False


def test_nothing_outlives_a_killed_launcher_and_the_next_one_works(stack: Stack, site: str) -> None:
    stack.start()
    through_proxy(stack, f"{site}/before")
    stack.wait_for("/before")
    stack.kill()
    stack.start()  # at once: it waits for what the dead one left
    assert [request["url"] for request in stack.requests("")] == [f"{site}/before"]
    stack.kill()
    until(lambda: not processes(stack), "all have ended", seconds=30)


def test_a_second_up_is_refused(running: Stack, tmp_path: Path) -> None:
    assert running.process is not None
    done = run_up(tmp_path, "--data-dir", running.data_dir, "--proxy-port", free_port(), "--api-port", free_port())
    assert f"in use by another megido up (pid {running.process.pid})" in refused(done)


def test_migrate_uses_the_server_that_runs(running: Stack) -> None:
    done = running.run("migrate", "--data-dir", running.data_dir)
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.count("up to date") == 2


def test_migrate_makes_schema_and_topics(tmp_path: Path, empty_database: str) -> None:
    command = [MEGIDO, "migrate", "--data-dir", tmp_path / "d", "--database-url", empty_database]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment()).stdout
        for _ in range(2)
    )
    assert "schema none → " in first
    assert "topics created on the local bus" in first
    assert "megido.flows" in first
    assert second.count("up to date") == 2


def test_a_second_signal_hastens(stack: Stack) -> None:
    stack.start()
    assert stack.process is not None
    ingest = pid_of(stack, "megido_ingest")
    os.kill(ingest, signal.SIGSTOP)  # it would be waited for
    stack.process.send_signal(signal.SIGINT)
    until(lambda: not any("megido_capture" in command for command in processes(stack).values()), "it is stopping")
    began = time.monotonic()
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(timeout=30) == 0
    assert time.monotonic() - began < 15
    assert not processes(stack)


def test_without_a_service_and_with_a_database_of_one_s_own(stack: Stack, database: str) -> None:
    options = ["--without", "capture", "--without", "replayer", "--database-url", database]
    command = [MEGIDO, "up", "--data-dir", stack.data_dir, "--log-dir", stack.log_dir, *options]
    with stack.screen_file.open("wb") as screen:
        stack.process = subprocess.Popen(
            [*map(str, command), "--api-port", str(stack.api_port)],
            stdout=screen,
            stderr=screen,
            env=clean_environment(),
        )
    until(lambda: "Megido is running" in stack.screen(), "it runs", seconds=40)
    names = {name for name in ("capture", "ingest", "api", "replayer") if (f"megido_{name}") in str(processes(stack))}
    assert names == {"ingest", "api"}
    assert not (stack.data_dir / "postgres").exists()
    assert stack.stop() == 0
    assert not processes(stack)


def test_a_token_is_not_shown_by_ps() -> None:
    options = UpOptions.of(
        data_dir="/tmp/x", capture_arguments=["--auth-required", "--auth-token", "secret"], env={"PATH": "/bin"}
    )
    assert options.capture_arguments == ("--auth-required",)
    assert options.environment["PROXY_AUTH_TOKEN"] == "secret"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"without": ["kafka"]}, "no such service"),
        ({"proxy_port": 8000}, "both 8000"),
        ({"capture_arguments": ["--listen-port", "9"]}, "--proxy-port"),
        ({"capture_arguments": ["--listen-port=9"]}, "--proxy-port"),
        ({"capture_arguments": ["--set", "listen_port=9"]}, "--proxy-port"),
        ({"capture_arguments": ["--set=listen_port=9"]}, "--proxy-port"),
        ({"capture_arguments": ["--metrics-port", "9"]}, "chooses the ports"),
        ({"without": ["capture"], "capture_arguments": ["--sourceapp"]}, "no option of megido up"),
    ],
)
def test_options_that_cannot_work(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        UpOptions.of(data_dir="/tmp/x", env={}, **given)  # type: ignore[arg-type]


def test_children_are_known_by_more_than_their_pid(tmp_path: Path) -> None:
    from megido.launcher.checks import Children
    from megido_shared.datadir import DataDir

    data_dir = DataDir(tmp_path)
    data_dir.run.mkdir()
    (data_dir.run / "children.json").write_text(json.dumps({str(os.getpid()): "1"}))
    Children(data_dir).wait_for_orphans()  # somebody else has that pid now: us
    assert not (data_dir.run / "children.json").exists()


@pytest.mark.kafka
def test_on_kafka_one_forwarder_ships_everything(fresh_kafka: Node, stack: Stack, site: str) -> None:
    stack.kafka = kafka = fresh_kafka.bootstrap
    stack.start()
    assert f"Kafka at {kafka}" in stack.screen()
    through_proxy(stack, f"{site}/shipped")
    stack.wait_for("/shipped")
    assert sum("bus.forwarder" in command for command in processes(stack).values()) == 1
    through_proxy(stack, f"{site}/last")
    assert stack.stop() == 0
    assert not processes(stack)
    stack.start()
    assert len(stack.requests("/last")) == 1, "it was stored, or waits on Kafka or in the journal"
    assert stack.stop() == 0


def test_the_commands_over_a_running_stack(running: Stack, site: str) -> None:
    stack = running
    through_proxy(stack, f"{site}/one?a=1")
    through_proxy(stack, f"{site}/two")
    first, second = (stack.wait_for(part)[0]["id"] for part in ("/one", "/two"))

    listed = stack.run("list", "--url", "/one", "--method", "get", "--limit", "5").stdout.splitlines()
    assert listed[0].split() == ["ID", "TIME", "METHOD", "STATUS", "MS", "SIZE", "PROTOCOL", "SOURCE", "URL"]
    assert len(listed) == 2
    assert listed[1].endswith(f"{site}/one?a=1")
    documents = [json.loads(line) for line in stack.run("list", "--json").stdout.splitlines()]
    assert [document["id"] for document in documents] == [second, first]
    assert [json.loads(line)["id"] for line in stack.run("search", "two", "--json").stdout.splitlines()] == [second]

    shown = stack.run("show", str(first)).stdout
    for expected in (f"{site}/one?a=1", "GET", "HTTP", "127.0.0.1", "Response  200", "hello", "Content-Length: 5"):
        assert expected in shown

    replayed = stack.run("replay", str(first)).stdout
    assert "→ 200 in " in replayed and "5 bytes" in replayed
    other = stack.run("replay", str(first), "--target-url", f"{site}/other", "--verbose").stdout
    assert f"{site}/other" in other and "Content-Length: 5" in other and "hello" in other

    done = stack.run("replay-range", str(first), str(second), "--delay", "0")
    assert len(done.stdout.splitlines()) == 2
    assert "2 replayed, 0 failed" in done.stderr

    for command in ("show", "replay"):
        unknown = stack.run(command, "999999", check=False)
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert unknown.stderr == "megido: no request has the id 999999; see: megido list\n"
    assert stack.run("replay-range", "900000", "900001", check=False).returncode == 1
    failed = stack.run("replay", str(first), "--target-url", f"http://127.0.0.1:{free_port()}", check=False)
    assert failed.returncode == 1
    assert "refused" in failed.stdout
