"""The one screen calls the program as the reader's shell can."""

import sys
from pathlib import Path

import pytest

from megido.launcher.screen import command


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "my env" / "bin" / "megido"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "up"])
    return program


def test_by_its_name_when_the_path_has_it(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program.parent))
    assert command() == "megido"


def test_by_its_path_when_not(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert command() == f"'{program}'"
    monkeypatch.chdir(program.parent.parent)
    assert command() == "bin/megido"
