"""Line 4: who may connect at all, by address. What denies wins, and only the connection's own address counts."""

import asyncio
import sys
from pathlib import Path

import pytest

from megido_capture.access.addresses import address_of, client_key
from megido_capture.access.gate import AddressLists
from megido_shared.errors import ConfigurationError
from megido_shared.events import AuthAttempted
from tests.integration.capture.harness import capture, curl, flows, run
from tests.integration.capture.upstream import Upstream
from tests.support.inside import inside

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize(
    ("allowed", "denied", "address", "served"),
    [
        ("", "", "203.0.113.9", True),
        ("10.0.0.0/8", "", "10.255.0.1", True),
        ("10.0.0.0/8", "", "11.0.0.1", False),
        ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", False),
        ("10.1.2.3", "10.0.0.0/8", "10.1.2.3", False),
        ("", "10.0.0.0/8", "10.1.2.3", False),
        ("", "10.0.0.0/8", "::ffff:10.1.2.3", False),
        ("", "::ffff:10.0.0.0/104", "10.1.2.3", False),
        ("10.0.0.0/8", "", "::ffff:10.1.2.3", True),
        ("", "fe80::/10", "fe80::1%eth0", False),
        ("fe80::/10", "", "fe80::1%eth0", True),
        ("2001:db8::/32, 192.0.2.1", "", "2001:db8::7", True),
        ("2001:db8::/32, 192.0.2.1", "", "192.0.2.1", True),
        ("0.0.0.0/0", "", "2001:db8::7", False),
        ("10.0.0.0/8", "", "", False),
        ("", "10.0.0.0/8", "a unix socket", False),
    ],
)
def test_lists(allowed: str, denied: str, address: str, served: bool) -> None:
    assert bool(AddressLists(allowed, denied).refusal(address)) is not served


def test_an_ipv6_client_counts_with_its_64() -> None:
    assert client_key("2001:db8:0:1::1") == client_key("2001:db8:0:1:ffff::2") != client_key("2001:db8:0:2::1")
    assert client_key("::ffff:192.0.2.1") == client_key("192.0.2.1") == "192.0.2.1"
    assert address_of("fe80::1%3") == address_of("fe80::1")


async def test_a_denied_client_is_told_and_audited(tmp_path: Path, upstream: Upstream) -> None:
    lists = ("--set", "ip_whitelist=127.0.0.0/8", "--set", "ip_blacklist=127.0.0.2,127.0.1.0/24")
    async with capture(tmp_path, *lists) as proxy:
        url = f"http://127.0.0.1:{upstream.port}/plain"
        assert (await curl(proxy, url)).status == 200
        forged = ("-H", "X-Forwarded-For: 127.0.0.1", "-H", "Forwarded: for=127.0.0.1", "-H", "X-Real-IP: 127.0.0.1")
        for address in ("127.0.0.2", "127.0.1.9"):
            answer = await curl(proxy, url, "--interface", address, *forged)
            assert answer.status == 403 and b"does not serve" in answer.body
        assert (await curl(proxy, url.replace("http", "https"), "--interface", "127.0.0.2")).status in (0, 403)
        honest = ("-H", "X-Forwarded-For: 127.0.0.2")
        assert (await curl(proxy, url, *honest)).status == 200
        assert len(upstream.seen) == 2
        found = flows(await proxy.events(), AuthAttempted)
        assert [(attempt.success, attempt.client.ip) for attempt in found] == [
            (False, "127.0.0.2"),
            (False, "127.0.1.9"),
            (False, "127.0.0.2"),
        ]
        assert all("ip_blacklist" in attempt.failure_reason for attempt in found)


async def test_denied_clients_take_nobodys_place(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(tmp_path, "--set", "ip_blacklist=127.0.0.2", "--max-concurrent-clients", "2") as proxy:
        opened = [
            await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=("127.0.0.2", 0)) for _ in range(150)
        ]
        url = f"http://127.0.0.1:{upstream.port}/plain"
        assert [(await curl(proxy, url)).status for _ in range(3)] == [200] * 3
        for reader, _ in opened:  # silent ones are let go after two seconds at most
            assert await asyncio.wait_for(reader.read(), 20) == b""


async def test_a_change_ends_what_is_open(tmp_path: Path, upstream: Upstream) -> None:
    async with inside(tmp_path) as proxy:
        opened = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        for address in ("127.0.0.1", "127.0.0.2"):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=(address, 0))
            writer.write(f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            opened.append((reader, writer))
        proxy.apply(ip_blacklist="127.0.0.2")
        assert await asyncio.wait_for(opened[1][0].read(), 20) == b""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opened[0][0].read(), 0.3)
        [attempt] = flows(await proxy.events(), AuthAttempted)
        assert attempt.client.ip == "127.0.0.2" and not attempt.success
        with pytest.raises(ConfigurationError, match=r"10\.0\.0\.300"):
            proxy.apply(ip_whitelist="127.0.0.1, 10.0.0.300")
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status == 200


@pytest.mark.parametrize("option", ["ip_whitelist", "ip_blacklist"])
@pytest.mark.parametrize("entry", ["10.0.0.0/33", "10.0.0.1/8", "10.0.0", "fe80::/129", "example.org", "10.0.0.0-9"])
async def test_a_bad_entry_refuses_to_start(tmp_path: Path, option: str, entry: str) -> None:
    command = (sys.executable, "-m", "megido_capture", "--data-dir", str(tmp_path), "--listen-port", "0")
    given = ("--metrics-port", "0", "--no-forwarder", "--set", f"{option}=127.0.0.1,{entry}")
    code, printed = await run(*command, *given)
    assert code != 0 and entry in printed and option in printed and len(printed.strip().splitlines()) == 1
