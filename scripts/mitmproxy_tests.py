"""Runs mitmproxy's own tests against the installed mitmproxy, without and with the fast path, and compares.

    .venv/bin/python scripts/mitmproxy_tests.py CHECKOUT [pytest arguments]

CHECKOUT is a source tree of mitmproxy (its `test` folder is all that is used) at the installed version or near it.
Exit code 0 when every test ends the same both ways. Tests that fail without us too are named, and prove nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from mitmproxy import addonmanager, options

from megido_capture import master
from megido_capture.mitm import fastpath

SWITCH = "MEGIDO_TESTED_FASTPATH"
HERE = Path(__file__).resolve().parents[1]
INI = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
RERUNS = 2
"""Some of mitmproxy's tests race with each other on a busy machine: what differs is run again, alone."""


def pytest_configure() -> None:
    """This module is also the plugin that puts the replacements in place."""
    if not os.environ.get(SWITCH):
        return
    fastpath.replace_hot_spots()
    options.Options = fastpath.Options
    # Hooks are called in place for every master of the tests, as for our own; but they are looked up each time,
    # because tests change addons as they like.
    for name in ("start", "_find", "_go_on"):
        setattr(addonmanager.AddonManager, name, getattr(master.Dispatcher, name))
    addonmanager.AddonManager._functions = _Forgetful()


class _Forgetful(dict[str, Any]):
    def __setitem__(self, name: str, functions: Any) -> None:
        """Keeps nothing."""


def outcomes(checkout: Path, tests: list[str], arguments: list[str], *, fast: bool) -> dict[str, str]:
    """How each test ended: passed, failed or skipped, by its name."""
    with tempfile.TemporaryDirectory(prefix="mitmproxy-tests-") as name:
        ini, report = Path(name) / "pytest.ini", Path(name) / "report.xml"
        ini.write_text(INI, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-c", str(ini)]
        command += ["--rootdir", str(checkout), "--import-mode=prepend", "-p", "scripts.mitmproxy_tests"]
        command += ["--junit-xml", str(report), *arguments, *tests]
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "HOME": name}
        environment.pop(SWITCH, None)
        if fast:
            environment[SWITCH] = "1"
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
        cases = ET.parse(report).getroot().iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ET.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def _different(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def _file_of(name: str, checkout: Path) -> str:
    """The file that holds a test: its class name begins with the module's."""
    parts = name.partition("::")[0].split(".")
    while parts and not (checkout / "/".join(parts)).with_suffix(".py").is_file():
        parts.pop()
    return "/".join(parts) + ".py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    known, arguments = parser.parse_known_args()
    checkout = known.checkout.resolve()
    tests, parallel = ["test/mitmproxy"], [*arguments, "-n", str(known.workers)]
    before = outcomes(checkout, tests, parallel, fast=False)
    after = outcomes(checkout, tests, parallel, fast=True)
    different = _different(before, after)
    for _ in range(RERUNS):
        if different:
            files = sorted({_file_of(name, checkout) for name in different})
            again = [outcomes(checkout, files, arguments, fast=fast) for fast in (False, True)]
            different &= _different(*again)
    for label, found in (("without", before), ("with", after)):
        counted = {kind: sum(value == kind for value in found.values()) for kind in ("passed", "failed", "skipped")}
        print(f"{label} the fast path: " + ", ".join(f"{number} {kind}" for kind, number in counted.items()))
    for name in sorted(name for name, value in before.items() if value == "failed"):
        print(f"  fails without it too: {name}")
    for name in sorted(different):
        print(f"  DIFFERENT: {name}: {before.get(name)} without, {after.get(name)} with")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
