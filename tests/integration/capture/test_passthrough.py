"""Hosts on the pass-through list keep their own TLS: seen by real clients that trust only the server's authority."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from megido_capture.limits.places import IDLE
from megido_shared.events import ErrorRaised, ErrorType, FlowCompleted, NodeStatus
from tests.integration.capture.harness import Proxy, capture, curl, flows, mitm, read_events
from tests.integration.capture.upstream import Upstream
from tests.support.inside import inside
from tests.support.raw_server import RawServer, Talk


@pytest.fixture
async def passing(tmp_path: Path, trusted: str) -> AsyncIterator[Proxy]:
    options = ["--set", f"ssl_verify_upstream_trusted_ca={trusted}", "--passthrough-hosts", "other.example, localhost"]
    async with capture(tmp_path / "data", *options) as proxy:
        yield proxy


async def pinned(proxy: Proxy, url: str, trusted: str, *arguments: str) -> tuple[int, bytes]:
    """What a client gets that trusts the server's authority and no other."""
    answer = await curl(proxy, url, "--cacert", trusted, "--capath", "/dev/null", *arguments)
    return answer.code, answer.body


type Ways = Literal["connect", "socks", "straight"]


async def issuer(proxy: Proxy, host: str, port: int, sni: str | None, way: Ways = "connect") -> str:
    """Who issued the certificate that a client sees."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    match way:
        case "connect":
            writer.write(f"CONNECT {host}:{port} HTTP/1.1\r\n\r\n".encode())
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        case "socks":
            kind, place = b"\3", bytes([len(host)]) + host.encode()
            if host[0].isdigit():
                kind, place = b"\1", socket.inet_aton(host)
            writer.write(b"\5\1\0")
            assert await reader.readexactly(2) == b"\5\0"
            writer.write(b"\5\1\0" + kind + place + port.to_bytes(2))
            assert (await reader.readexactly(10))[1] == 0
    trusting_all = ssl.create_default_context()
    trusting_all.check_hostname, trusting_all.verify_mode = False, ssl.CERT_NONE
    await writer.start_tls(trusting_all, server_hostname=sni)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return "ours" if b"mitmproxy" in certificate else "the server's"


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_a_client_that_pins_is_served(passing: Proxy, upstream_tls: Upstream, trusted: str, version: str) -> None:
    code, body = await pinned(passing, f"https://localhost:{upstream_tls.port}/plain/pinned", trusted, version)
    assert code == 0 and b"pinned" in body


async def test_it_leaves_no_flow_and_is_counted(passing: Proxy, upstream_tls: Upstream, trusted: str) -> None:
    for _ in range(2):
        assert (await pinned(passing, f"https://localhost:{upstream_tls.port}/plain", trusted))[0] == 0
    other = await curl(passing, f"https://127.0.0.1:{upstream_tls.port}/plain")
    assert other.status == 200, "not on the list: under our certificate"
    found = await passing.until(lambda events: bool(flows(events)))
    assert [event.request.host for event in found if event.seq] == ["127.0.0.1"]
    assert passing.stop() == 0
    beats = [event for event in await read_events(passing.data_dir) if isinstance(event, NodeStatus)]
    assert beats[-1].counters["passed_through"] == 2
    assert "".join(passing.output).count("TLS to localhost passes through unrecorded") == 1


NAMES = [
    ("localhost", "localhost", "the server's"),
    ("localhost", "LOCALHOST", "the server's"),
    ("localhost", "other.example", "the server's"),
    ("localhost", None, "the server's"),
    ("localhost", "elsewhere.example", "ours"),
    ("127.0.0.1", "elsewhere.example", "ours"),
    ("127.0.0.1", None, "ours"),
]
"""Where a client goes, what its hello names, whose certificate it sees; `localhost` and `other.example` are listed."""


@pytest.mark.parametrize(("host", "sni", "whose"), [*NAMES, ("127.0.0.1", "localhost", "ours")])
async def test_by_host_of_connect_and_by_name_in_the_hello(
    passing: Proxy, upstream_tls: Upstream, host: str, sni: str | None, whose: str
) -> None:
    """What a client only claims in its hello takes nothing past the record, wherever its tunnel leads."""
    assert await issuer(passing, host, upstream_tls.port, sni) == whose


@pytest.mark.parametrize(("host", "sni", "whose"), [*NAMES, ("127.0.0.1", "localhost", "ours")])
async def test_by_both_names_over_another_proxy(
    tmp_path: Path, upstream_tls: Upstream, trusted: str, host: str, sni: str | None, whose: str
) -> None:
    """One that is at a listed address: it is not where a tunnel leads."""

    async def chained(talk: Talk) -> None:
        await talk.head()
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream_tls.port)
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\n")
        back = asyncio.create_task(relay(reader, talk.writer))
        try:
            while True:
                writer.write(await talk.some())
        finally:
            back.cancel()
            writer.close()

    async with RawServer(chained) as behind:
        options = ["--passthrough-hosts", f"localhost, other.example, 127.0.0.1:{behind.port}"]
        options += ["--set", f"ssl_verify_upstream_trusted_ca={trusted}"]
        async with capture(tmp_path / "data", *options, "--mode", f"upstream:http://127.0.0.1:{behind.port}") as proxy:
            assert await issuer(proxy, host, upstream_tls.port, sni) == whose


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


@pytest.mark.parametrize(("host", "sni", "whose"), [*NAMES, ("127.0.0.1", "localhost", "the server's")])
async def test_over_socks_the_name_in_the_hello_counts_where_it_is_the_only_one(
    tmp_path: Path, upstream_tls: Upstream, trusted: str, host: str, sni: str | None, whose: str
) -> None:
    options = ["--set", f"ssl_verify_upstream_trusted_ca={trusted}", "--passthrough-hosts", "other.example, localhost"]
    async with capture(tmp_path / "data", *options, "--mode", "socks5") as proxy:
        assert await issuer(proxy, host, upstream_tls.port, sni, "socks") == whose


@pytest.mark.parametrize(("hosts", "whose"), [("other.example", "ours"), ("localhost", "the server's")])
async def test_in_reverse_mode_the_server_decides(
    tmp_path: Path, upstream_tls: Upstream, trusted: str, hosts: str, whose: str
) -> None:
    options = ["--set", f"ssl_verify_upstream_trusted_ca={trusted}", "--passthrough-hosts", hosts]
    mode = f"reverse:https://localhost:{upstream_tls.port}"
    async with capture(tmp_path / "data", *options, "--mode", mode) as proxy:
        assert await issuer(proxy, "", 0, "other.example", "straight") == whose


async def test_tls_with_the_proxy_itself_leads_nowhere_yet(passing: Proxy) -> None:
    assert await issuer(passing, "", 0, "localhost", "straight") == "ours"


async def test_both_names_are_in_the_log_once(passing: Proxy, upstream_tls: Upstream) -> None:
    for sni in ("other.example", "other.example", "localhost", None):
        assert await issuer(passing, "localhost", upstream_tls.port, sni) == "the server's"
    assert passing.stop() == 0
    told = [line.partition(": TLS to ")[2].strip() for line in passing.output if "passes through" in line]
    assert told == [
        "localhost (named other.example in the client's hello) passes through unrecorded (passthrough_hosts)",
        "localhost passes through unrecorded (passthrough_hosts)",
        "localhost (unnamed in the hello) passes through unrecorded (passthrough_hosts)",
    ]
    beats = [event for event in await read_events(passing.data_dir) if isinstance(event, NodeStatus)]
    assert beats[-1].counters["passed_through"] == 4


@pytest.mark.parametrize(
    ("hosts", "through"),
    [
        ("127.0.0.0/8", True),
        ("127.0.0.1:{port}", True),
        ("127.0.0.1:1", False),
        ("*.localhost", False),
        ("10.0.0.0/8", False),
    ],
)
async def test_addresses_networks_and_ports(
    tmp_path: Path, upstream_tls: Upstream, trusted: str, hosts: str, through: bool
) -> None:
    hosts = hosts.replace("{port}", str(upstream_tls.port))
    async with capture(tmp_path / "data", "--passthrough-hosts", hosts) as proxy:
        code, _ = await pinned(proxy, f"https://localhost:{upstream_tls.port}/plain", trusted)
    assert (code == 0) is through


async def test_the_list_changes_while_it_runs(tmp_path: Path, upstream_tls: Upstream, trusted: str) -> None:
    url = f"https://localhost:{upstream_tls.port}/plain"
    async with inside(tmp_path / "data") as proxy:
        for hosts, code in (("", 60), ("localhost", 0), ("", 60)):
            proxy.apply(passthrough_hosts=hosts)
            answer = await curl(proxy, url, "--cacert", trusted, "--capath", "/dev/null")
            assert answer.code == code


async def test_inside_mitmdump(tmp_path: Path, upstream_tls: Upstream, trusted: str) -> None:
    async with mitm("mitmdump", tmp_path / "data", "passthrough_hosts=localhost") as proxy:
        assert (await pinned(proxy, f"https://localhost:{upstream_tls.port}/plain", trusted))[0] == 0
        assert flows(await proxy.events()) == []


async def test_mitmproxys_own_list_goes_on_working(tmp_path: Path, upstream_tls: Upstream, trusted: str) -> None:
    async with capture(tmp_path / "data", "--set", "ignore_hosts=localhost") as proxy:
        assert (await pinned(proxy, f"https://localhost:{upstream_tls.port}/plain", trusted))[0] == 0


async def test_access_control_holds(tmp_path: Path, upstream_tls: Upstream, trusted: str) -> None:
    options = ["--passthrough-hosts", "localhost", "--auth-required", "--auth-token", "right"]
    async with capture(tmp_path / "data", *options) as proxy:
        url = f"https://localhost:{upstream_tls.port}/plain"
        assert (await pinned(proxy, url, trusted))[0] == 56
        assert (await pinned(proxy, url, trusted, "--proxy-user", "me:right"))[0] == 0


async def test_a_silent_tunnel_is_not_closed_for_another_client(
    tmp_path: Path, upstream_tls: Upstream, trusted: str
) -> None:
    """As an idle connection would be, after `IDLE` seconds."""
    options = ["--passthrough-hosts", "localhost", "--max-concurrent-clients", "1"]
    async with capture(tmp_path / "data", *options) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(f"CONNECT localhost:{upstream_tls.port} HTTP/1.1\r\n\r\n".encode())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await writer.start_tls(ssl.create_default_context(cafile=trusted), server_hostname="localhost")
        silent_since = time.monotonic()
        while time.monotonic() < silent_since + 2 * IDLE:
            assert (await curl(proxy, f"https://127.0.0.1:{upstream_tls.port}/")).status == 503
        writer.write(b"GET /plain HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()


async def test_over_another_proxy(tmp_path: Path, upstream_tls: Upstream, trusted: str, passing: Proxy) -> None:
    options = ["--passthrough-hosts", "localhost", "--mode", f"upstream:{passing.url}"]
    async with capture(tmp_path / "chained", *options) as proxy:
        assert (await pinned(proxy, f"https://localhost:{upstream_tls.port}/plain", trusted))[0] == 0


async def test_a_client_that_refuses_us_is_told_what_to_do(proxy: Proxy, upstream_tls: Upstream, trusted: str) -> None:
    assert (await pinned(proxy, f"https://localhost:{upstream_tls.port}/plain", trusted))[0] == 60
    found = await proxy.until(lambda events: any(event.seq for event in events))
    [event] = [event for event in found if event.seq]
    assert isinstance(event, ErrorRaised) and event.failure.error_type is ErrorType.SSL_ERROR
    for part in (
        "http://mitm.it",
        "--passthrough-hosts localhost",
        'POST /proxy/api/config/passthrough/ {"host": "localhost"}',
    ):
        assert part in event.failure.message


async def test_a_bad_entry_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="passthrough_hosts: 'a b' is no host name"):
        async with capture(tmp_path / "data", "--passthrough-hosts", "a b"):
            pass


async def test_the_rest_is_recorded_as_before(passing: Proxy, upstream: Upstream) -> None:
    """Plain HTTP to a host on the list: there is no TLS to leave alone."""
    assert (await curl(passing, f"http://localhost:{upstream.port}/plain")).status == 200
    [flow] = flows(await passing.until(lambda events: bool(flows(events))))
    assert isinstance(flow, FlowCompleted)
