"""Who may use the proxy, tried with curl."""

import base64
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megido_shared.events import AuthAttempted, FlowCompleted, unpack_headers
from tests.integration.capture.harness import Answer, Proxy, capture, curl, flows, run, start
from tests.integration.capture.upstream import Upstream

_numbers = itertools.count(1)

TOKEN = "s3cret:with:colons"
BEARER = ("--proxy-header", f"Proxy-Authorization: Bearer {TOKEN}")
BASIC = ("--proxy-user", f"anna:{TOKEN}")


@pytest.fixture(scope="module")
def guarded_process(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[Proxy]:
    option = f"ssl_verify_upstream_trusted_ca={trusted}"
    data_dir = tmp_path_factory.mktemp("guarded")
    proxy = start(data_dir, "--auth-required", "--set", option, PROXY_AUTH_TOKEN=TOKEN)
    yield proxy
    proxy.stop()


@pytest.fixture
def guarded(guarded_process: Proxy) -> Proxy:
    return guarded_process.from_now()


async def asked(proxy: Proxy, url: str, *arguments: str) -> Answer:
    """From an address that asks for the first time: what others were refused is no flood of it."""
    return await curl(proxy, url, "--interface", f"127.2.0.{next(_numbers)}", *arguments)


@pytest.mark.parametrize("credentials", [BEARER, BASIC])
@pytest.mark.parametrize("tls", [False, True])
async def test_good_credentials(
    guarded: Proxy, upstream: Upstream, upstream_tls: Upstream, credentials: tuple[str, ...], tls: bool
) -> None:
    url = f"https://localhost:{upstream_tls.port}/echo" if tls else f"http://127.0.0.1:{upstream.port}/echo"
    username = "anna" if credentials is BASIC else ""
    if not tls:  # without a tunnel curl sends its proxy headers only when told twice
        credentials = tuple("-H" if item == "--proxy-header" else item for item in credentials)
    answer = await asked(guarded, url, "--http1.1", *credentials)
    assert answer.status == 200 and b"proxy-authorization" not in answer.body.lower()
    assert TOKEN.encode() not in answer.body
    found = await guarded.events()
    [attempt], [flow] = flows(found, AuthAttempted), flows(found)
    assert attempt.success and attempt.username == username
    assert not [name for name, _ in unpack_headers(flow.request.headers) if name.lower() == b"proxy-authorization"]


@pytest.mark.parametrize(
    "credentials",
    [
        (),
        ("--proxy-user", "anna:wrong"),
        ("--proxy-user", f"{TOKEN}:"),
        ("-H", "Proxy-Authorization: Bearer wrong"),
        ("-H", "Proxy-Authorization: Bearer"),
        ("-H", f"Proxy-Authorization: Digest {TOKEN}"),
        ("-H", "Proxy-Authorization: Basic %%%"),
    ],
)
async def test_bad_credentials(guarded: Proxy, upstream: Upstream, credentials: tuple[str, ...]) -> None:
    answer = await asked(guarded, f"http://127.0.0.1:{upstream.port}/plain", "-D", "-", *credentials)
    assert answer.status == 407
    assert b"proxy-authenticate: basic" in answer.body.lower() and b"proxy-authenticate: bearer" in answer.body.lower()
    assert upstream.seen == []
    found = await guarded.events()
    assert [(event.success, bool(event.failure_reason)) for event in flows(found, AuthAttempted)] == [(False, True)]
    assert not flows(found)


async def test_refused_connect(guarded: Proxy, upstream_tls: Upstream) -> None:
    assert (await asked(guarded, f"https://localhost:{upstream_tls.port}/plain")).status == 407
    found = await guarded.events()
    assert [type(event) for event in found] == [AuthAttempted] and upstream_tls.seen == []


async def test_success_is_told_once_a_connection(guarded: Proxy, upstream: Upstream) -> None:
    base = f"http://127.0.0.1:{upstream.port}/plain/"
    await asked(guarded, base + "a", base + "b", base + "c", "-o", "/dev/null", "-o", "/dev/null", *BASIC)
    found = await guarded.events()
    assert len(flows(found)) == 3 and len(flows(found, AuthAttempted)) == 1


@pytest.mark.parametrize("header", ["X: y", "Transfer-Encoding: chunked", "Expect:", "Expect: 100-continue"])
async def test_refused_upload_ends_at_once(guarded: Proxy, upstream: Upstream, tmp_path: Path, header: str) -> None:
    path = tmp_path / "upload"
    path.write_bytes(b"x" * 3_000_000)
    answer = await asked(guarded, f"http://127.0.0.1:{upstream.port}/count", "--data-binary", f"@{path}", "-H", header)
    assert answer.status in (407, 0) and answer.code != 28  # not hanging until curl gives up
    assert upstream.seen == []
    [attempt] = flows(await guarded.events(), AuthAttempted)
    assert not attempt.success
    assert (await asked(guarded, f"http://127.0.0.1:{upstream.port}/plain", *BASIC)).status == 200


async def test_a_secret_is_in_no_file(guarded: Proxy, upstream: Upstream) -> None:
    await asked(guarded, f"http://127.0.0.1:{upstream.port}/plain", *BASIC)
    encoded = base64.b64encode(f"anna:{TOKEN}".encode())
    for path in guarded.data_dir.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert TOKEN.encode() not in content and encoded not in content, path
    assert not [line for line in guarded.output if TOKEN in line]


async def test_credentials_nobody_asked_for_go_nowhere(proxy: Proxy, upstream: Upstream) -> None:
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/echo", "--proxy-user", "anna:pass")
    assert answer.status == 200 and b"proxy-authorization" not in answer.body.lower()
    [flow] = flows(await proxy.events(), FlowCompleted)
    assert not [name for name, _ in unpack_headers(flow.request.headers) if name.lower() == b"proxy-authorization"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--auth-required",), "auth_token"),
        (("--listen-host", "0.0.0.0"), "without authentication"),
        (("--listen-host", "::"), "without authentication"),
        (("--mode", "regular@0.0.0.0:0"), "without authentication"),
        (("--mode", "socks5", "--auth-required", "--auth-token", "x"), "socks5"),
        (("--max-body-size", "-1"), "max_body_size"),
        (("--connection-timeout", "0"), "connection_timeout"),
        (("--cache-ttl", "0"), "cache_ttl"),
        (("--api-url", "localhost"), "api_url"),
        (("--set", "no_such_option=1"), "no_such_option"),
        (("--set", "max_body_size=many"), "max_body_size"),
        (("--mode", "sideways"), "sideways"),
        (("--node-name", "../up"), "../up"),
    ],
)
async def test_bad_configuration_is_one_line(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    command = (sys.executable, "-m", "megido_capture", "--data-dir", str(tmp_path), "--listen-port", "0")
    code, printed = await run(*command, "--metrics-port", "0", "--no-forwarder", *arguments)
    assert code != 0 and says in printed and len(printed.strip().splitlines()) == 1


async def test_taken_port_is_one_line(proxy: Proxy, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "megido_capture", "--data-dir", str(tmp_path / "other"))
    code, printed = await run(*command, "--listen-port", str(proxy.port), "--metrics-port", "0", "--no-forwarder")
    assert code != 0 and str(proxy.port) in printed and len(printed.strip().splitlines()) == 1


async def test_open_proxy_when_meant(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(tmp_path / "data", "--listen-host", "0.0.0.0", "--allow-open-proxy") as proxy:
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status == 200
        assert any("anybody" in line for line in proxy.output)
