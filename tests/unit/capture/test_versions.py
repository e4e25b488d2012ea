"""A proxy runs only with the libraries whose private parts its guards were tested with."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megido_capture.mitm import fastpath, versions
from megido_capture.mitm.fastpath import handler
from megido_shared.errors import ConfigurationError

ROOT = Path(__file__).parents[3]


def test_what_is_locked_was_tested() -> None:
    versions.require_tested()


@pytest.mark.parametrize(
    ("name", "version"), [("mitmproxy", "13.0.0"), ("h2", "4.5.0"), ("wsproto", "2.0"), ("h11", "1.0")]
)
def test_anything_else_is_refused_before_it_is_touched(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    monkeypatch.setattr(versions, "version", lambda found: version if found == name else metadata.version(found))
    monkeypatch.setattr(handler, "replace", lambda: pytest.fail("touched"))
    with pytest.raises(ConfigurationError, match=rf"{name} {version}.* was tested with .*requirements.lock"):
        fastpath.replace_hot_spots()


@pytest.mark.parametrize("name", versions.TESTED)
def test_an_installer_is_told_the_same_bounds(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {found.name: found for found in map(Requirement, project["optional-dependencies"]["capture"])}[name]
    minors = [(*map(int, known.split(".")), 0) for known in versions.TESTED[name]]
    last = (minors[-1][0], minors[-1][1] + 1, 0)
    assert any(wanted.specifier.contains(f"{minors[-1][0]}.{minors[-1][1]}.{patch}") for patch in range(20))
    assert not wanted.specifier.contains(".".join(map(str, last)))
    assert not wanted.specifier.contains(f"{minors[0][0]}.{minors[0][1] - 1}.99")
