"""What a person meets: help, wrong usage, exit codes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megido.main import SERVICES, main

MEGIDO = Path(sys.executable).with_name("megido")
COMMANDS = (
    "up",
    *SERVICES,
    "migrate",
    "list",
    "search",
    "errors",
    "accounting",
    "dead-letters",
    "show",
    "replay",
    "replay-range",
)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command} " in shown


@pytest.mark.parametrize(
    "command",
    ["up", "migrate", "list", "search", "errors", "accounting", "dead-letters", "show", "replay", "replay-range"],
)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: megido {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lsit"], "no such command 'lsit'"),
        (["list", "--limit", "many"], "'--limit'"),
        (["list", "--limit", "0"], "'--limit'"),
        (["list", "--nothing"], "--nothing"),
        (["errors", "--type", "SLOW"], "must be one of CONNECTION_RESET, TIMEOUT"),
        (["show"], "missing argument"),
        (["replay-range", "5", "1"], "the smaller id comes first"),
        (["up", "--without", "kafka"], "no such service"),
    ],
)
def test_wrong_usage_is_one_line_and_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("megido: ")
    assert says in line
    assert shown.out == ""


def test_no_api_is_one_line_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--api-url", "http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "start it with `megido up`" in line


def test_help_is_quick_because_it_loads_little() -> None:
    """0.3 s is the promise; what costs it is what gets imported, and that can be counted on a busy machine."""
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megido", "list", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in listing.stderr.splitlines()}
    assert not loaded & {"pydantic", "httpx", "sqlalchemy", "rich", "mitmproxy", "fastapi", "aiokafka"}
    fastest = min(_seconds() for _ in range(5))
    assert fastest < 1.0


def _seconds() -> float:
    began = time.monotonic()
    subprocess.run([MEGIDO, "list", "--help"], capture_output=True, check=True)
    return time.monotonic() - began


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_service_s_arguments_are_its_own(name: str) -> None:
    done = subprocess.run([MEGIDO, name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--data-dir" in done.stdout
