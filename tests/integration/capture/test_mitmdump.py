"""The addon in mitmproxy's own tools: every option of the founding document has its effect."""

import asyncio
import contextlib
import fcntl
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import msgspec
import pytest

from megido_shared.config import PayloadRule
from megido_shared.events import AuthAttempted, FlowCompleted, FlowFailed, NodeStatus
from tests.integration.capture.harness import ROOT, Proxy, body, curl, environment, flows, mitm, read_events, run, until
from tests.integration.capture.upstream import Upstream, full_backlog

pytestmark = pytest.mark.timeout(180)


async def test_every_option_has_its_effect(tmp_path: Path, upstream: Upstream) -> None:
    """One start with all of them: the token is asked for, the name recorded, the body cut, the connect timed out."""
    options = ("api_url=http://127.0.0.1:1", "source_app=scanner", "auth_required=true", "auth_token=tok:en")
    options += ("max_body_size=10", "websocket_enabled=false", "connection_timeout=1", "cache_ttl=1")
    async with mitm("mitmdump", tmp_path / "data", *options) as proxy:
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status == 407
        user = ("--proxy-user", "any:tok:en")
        answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain/long-enough", *user)
        assert answer.status == 200
        with full_backlog() as port:
            assert (await curl(proxy, f"http://127.0.0.1:{port}/", *user)).status == 502
        found = await proxy.until(lambda events: bool(flows(events, FlowFailed)))
    [flow], [timeout] = flows(found), flows(found, FlowFailed)
    assert flow.source_app == "scanner" and flow.response.body.truncated
    assert body(found, flow) == answer.body[:10] and flow.response.body.size == len(answer.body)
    assert timeout.failure.error_type == "TIMEOUT"
    assert [event.success for event in flows(found, AuthAttempted)] == [False, True, True]


async def test_environment_gives_the_defaults(tmp_path: Path, upstream: Upstream) -> None:
    env = {"PROXY_AUTH_TOKEN": "from-env", "PROXY_MAX_BODY_SIZE": "3", "PROXY_API_URL": "http://127.0.0.1:1"}
    async with mitm("mitmdump", tmp_path / "data", "auth_required=true", **env) as proxy:
        url = f"http://127.0.0.1:{upstream.port}/plain"
        assert (await curl(proxy, url)).status == 407
        assert (await curl(proxy, url, "--proxy-user", "x:from-env")).status == 200
        [flow] = flows(await proxy.events())
    assert flow.response.body.data == b'{"a'


async def test_what_set_and_the_environment_say_is_pinned(tmp_path: Path) -> None:
    """A default too, when it was said."""
    env = {"PROXY_AUTH_TOKEN": "from-env", "PROXY_API_URL": "http://127.0.0.1:1"}
    async with mitm("mitmdump", tmp_path / "data", "websocket_enabled=true", "max_body_size=7", **env):
        pass
    [*_, status] = [event for event in await read_events(tmp_path / "data") if isinstance(event, NodeStatus)]
    assert status.pinned == {"websocket_enabled": "true", "max_body_size": "7", "auth_token": "set"}


async def test_rules_are_polled_from_an_api_that_knows_no_more(tmp_path: Path, upstream: Upstream) -> None:
    rule = PayloadRule(
        id=7,
        name="mark",
        target_url_pattern="/echo",
        injection_type="header",
        injection_point="X-Megido",
        payload_content="v",
    )
    asked: list[str] = []

    async def api(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().split()[1])
        answer = msgspec.json.encode({"success": True, "count": 1, "rules": [msgspec.to_builtins(rule)]})
        status = b"200 OK" if "payload-rules" in asked[-1] else b"404 Not Found"
        length = len(answer)
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, length, answer))
        writer.close()

    server = await asyncio.start_server(api, "127.0.0.1", 0)
    api_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with mitm("mitmdump", tmp_path / "data", f"api_url={api_url}", "source_app=a b", "cache_ttl=1") as proxy:

        async def echoed() -> bytes:
            return (await curl(proxy, f"http://127.0.0.1:{upstream.port}/echo")).body

        await until(echoed, lambda head: b"X-Megido: v" in head)
        await until(_value(asked), lambda paths: len(paths) >= 4)
        found = await proxy.events()
    server.close()
    assert asked[0] == "/proxy/api/config/active/?source_app=a+b&node=capture-0"
    assert asked[1] == "/interceptor/api/payload-rules/active/?source_app=a+b"
    assert flows(found)[-1].rules == (7,)


def _value[T](found: T):  # type: ignore[no-untyped-def]
    async def read() -> T:
        return found

    return read


async def test_same_authority_as_the_service_and_private(tmp_path: Path, upstream_tls: Upstream, trusted: str) -> None:
    async with mitm("mitmdump", tmp_path / "data", f"ssl_verify_upstream_trusted_ca={trusted}") as proxy:
        assert (await curl(proxy, f"https://localhost:{upstream_tls.port}/plain")).status == 200
        assert stat.S_IMODE(proxy.ca.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE((proxy.ca.parent / "mitmproxy-ca.pem").stat().st_mode) == 0o600


async def test_only_loopback_is_served_when_no_host_was_named(tmp_path: Path) -> None:
    async with mitm("mitmdump", tmp_path / "data") as proxy:
        listening = await asyncio.to_thread(_listening, proxy.process.pid)
    assert listening == {f"127.0.0.1:{proxy.port}"}


@pytest.mark.parametrize("tool", ["mitmweb"])
async def test_other_front_ends(tmp_path: Path, upstream: Upstream, tool: str) -> None:
    async with mitm(tool, tmp_path / "data") as proxy:
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status == 200
        assert len(flows(await proxy.events())) == 1


async def test_console_front_end(tmp_path: Path, upstream: Upstream) -> None:
    """mitmproxy needs a terminal."""
    data_dir, url = tmp_path / "data", f"http://127.0.0.1:{upstream.port}/plain"
    process, terminal = await asyncio.to_thread(_in_terminal, data_dir)
    try:
        # Of all tools it takes the longest to begin. While it does, it may listen twice, on another port each time.
        async with asyncio.timeout(90):
            while (await curl(proxy := Proxy(process, data_dir, _port(process.pid)), url)).status != 200:
                await asyncio.sleep(0.05)
        await proxy.until(lambda events: bool(flows(events)))
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)
        os.close(terminal)


@pytest.mark.parametrize(
    ("options", "env", "says"),
    [
        (("auth_required=true",), {}, "auth_token"),
        (("max_body_size=many",), {}, "max_body_size"),
        (("max_body_size=-1",), {}, "max_body_size"),
        (("connection_timeout=0",), {}, "connection_timeout"),
        (("cache_ttl=0",), {}, "cache_ttl"),
        (("auth_required=perhaps",), {}, "auth_required"),
        (("api_url=nowhere",), {}, "api_url"),
        (("listen_host=0.0.0.0",), {}, "without authentication"),
        ((), {"PROXY_MAX_BODY_SIZE": "1MB"}, "PROXY_MAX_BODY_SIZE"),
    ],
)
async def test_bad_values_end_it_with_one_line(
    tmp_path: Path, options: tuple[str, ...], env: dict[str, str], says: str
) -> None:
    command = [str(Path(sys.executable).parent / "mitmdump"), "-q", "-s", str(ROOT / "services/capture/addon.py")]
    for option in (f"megido_data_dir={tmp_path}", "megido_forwarder=false", "listen_port=0", *options):
        command += ["--set", option]
    code, printed = await run(*command, **env)
    lines = [line for line in printed.splitlines() if "exiting" not in line]
    assert code != 0 and len(lines) == 1 and says in lines[0]


async def test_stop_under_load_loses_no_exchange_that_a_client_has(tmp_path: Path, upstream: Upstream) -> None:
    """Clients that keep their connections and ask again at once: each gets its last answer, and knows it."""
    got: list[bytes] = []

    async def ask(client: int, proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        last = False
        while not last:
            path = b"/plain/%d-%d" % (client, len(got))
            writer.write(b"GET http://127.0.0.1:%d%s HTTP/1.1\r\nHost: x\r\n\r\n" % (upstream.port, path))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and await reader.readuntil(b'"}')
            got.append(path)
            last = b"connection: close" in head.lower()
        writer.close()

    async with mitm("mitmdump", tmp_path / "data") as proxy:
        asking = [asyncio.create_task(ask(client, proxy)) for client in range(8)]
        await until(_value(got), lambda paths: len(paths) >= 400)
        proxy.process.terminate()
        await asyncio.wait_for(asyncio.gather(*asking), 30)
        assert await asyncio.to_thread(proxy.process.wait, 30) == 0
    found = await read_events(tmp_path / "data")
    ends = [event for event in found if event.seq]
    assert {type(event) for event in ends} == {FlowCompleted}
    assert sorted(flow.request.target for flow in ends) == sorted(got)
    states = [event.state for event in found if isinstance(event, NodeStatus)]
    assert (states[0], states[-1]) == ("started", "stopping")


def _listening(pid: int) -> set[str]:
    """The TCP addresses that a process listens on, from /proc."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(entry)[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                name = "127.0.0.1" if host == "0100007F" else host
                found.add(f"{name}:{int(port, 16)}")
    return found


def _port(pid: int) -> int:
    """The one that it listens on now; 1 when there is none, where nobody is."""
    return next((int(address.rpartition(":")[2]) for address in _listening(pid)), 1)


def _in_terminal(data_dir: Path):  # type: ignore[no-untyped-def]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [str(Path(sys.executable).parent / "mitmproxy"), "-s", str(ROOT / "services/capture/addon.py")]
    command += ["-p", "0", "--set", f"megido_data_dir={data_dir}", "--set", "megido_forwarder=false"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm"), start_new_session=True
    )
    os.close(theirs)
    threading.Thread(target=_drain, args=(os.dup(ours),), daemon=True).start()
    return process, ours


def _drain(terminal: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass
