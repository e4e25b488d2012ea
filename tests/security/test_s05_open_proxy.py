"""Line 5: loopback unless told otherwise, and nobody opens the proxy to others without credentials by accident."""

import sys
from pathlib import Path

import pytest

from tests.integration.capture.harness import ROOT, capture, run

pytestmark = pytest.mark.timeout(90)

MODES = ("regular", "upstream:http://127.0.0.1:1", "reverse:http://127.0.0.1:1", "socks5", "transparent")


def command(folder: Path, *arguments: str) -> tuple[str, ...]:
    service = (sys.executable, "-m", "megido_capture", "--data-dir", str(folder), "--metrics-port", "0")
    return (*service, "--no-forwarder", *arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["listen_host", "mode"])
async def test_refused_in_every_mode(tmp_path: Path, mode: str, how: str) -> None:
    where = ("--listen-host", "0.0.0.0", "--mode", mode) if how == "listen_host" else ("--mode", f"{mode}@0.0.0.0:0")
    code, printed = await run(*command(tmp_path, *where, "--listen-port", "0"))
    assert code != 0 and "without authentication" in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("host", ["::", "0.0.0.0", "10.0.0.1", "example.org", "::ffff:10.0.0.1"])
async def test_refused_on_every_address_of_others(tmp_path: Path, host: str) -> None:
    code, printed = await run(*command(tmp_path, "--listen-host", host, "--listen-port", "0"))
    assert code != 0 and host in printed and len(printed.strip().splitlines()) == 1


@pytest.mark.parametrize("mode", MODES[2:])
async def test_credentials_that_a_mode_cannot_ask_for(tmp_path: Path, mode: str) -> None:
    given = ("--mode", mode, "--auth-required", "--set", "auth_password=x", "--listen-port", "0")
    code, printed = await run(*command(tmp_path, *given))
    assert code != 0 and mode.partition(":")[0] in printed and len(printed.strip().splitlines()) == 1


async def test_an_override_warns(tmp_path: Path) -> None:
    async with capture(tmp_path, "--listen-host", "0.0.0.0", "--allow-open-proxy") as proxy:
        assert sum("anybody who reaches it" in line for line in proxy.output) == 1


@pytest.mark.parametrize("mode", [(), ("--mode", "socks5")])
async def test_refused_as_a_script_of_mitmdump(tmp_path: Path, mode: tuple[str, ...]) -> None:
    tool = str(Path(sys.executable).parent / "mitmdump")
    script = ("-s", str(ROOT / "services/capture/addon.py"), "--set", f"megido_data_dir={tmp_path}")
    where = ("--listen-host", "0.0.0.0", "-p", "0")
    code, printed = await run(tool, *script, *where, *mode, "--set", "megido_forwarder=false")
    assert code != 0 and "without authentication" in printed and "Traceback" not in printed
