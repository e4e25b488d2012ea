"""What a node keeps while the configuration changes or cannot be read, and what it must not keep."""

import asyncio
import shutil
from pathlib import Path

import argon2
import pytest

from tests.integration.capture.harness import capture, flows
from tests.integration.capture.test_liveconfig import Live, a_rule
from tests.integration.capture.upstream import Upstream


async def test_the_global_scope_changes_under_a_node_that_is_pinned(tmp_path: Path, upstream: Upstream) -> None:
    """By its own scope in one field, by its start in another: it takes the rest, and says what it keeps."""
    url = f"http://127.0.0.1:{upstream.port}/plain/whole"
    async with capture(tmp_path / "data", "--max-body-size", "5") as proxy:
        live = Live(proxy)
        await live.offer("node:capture-0", log_request_body=False)
        await live.set(max_body_size=1, log_request_body=True)
        await live.set(a_rule("header", "X-New", "1", pattern="/plain"), max_body_size=2, log_request_body=True)
        await live.curl(url, "-d", "12345678")
        [flow] = flows(await proxy.events())
        status = await live.status(lambda status: True)
        assert (flow.request.body.data, flow.request.body.size, len(flow.response.body.data)) == (b"", 8, 5)
        assert flow.rules == (1,) and b"X-New: 1" in upstream.seen[-1]
        assert status.pinned == {"max_body_size": "5"} and status.config_version == live.versions[0]
        # Its scope lets go: what the global one has said meanwhile is in force.
        await live.offer("node:capture-0")
        await live.status(lambda status: status.config_version == live.versions[0])
        await live.curl(url, "-d", "12345678")
        assert flows(await proxy.events())[-1].request.body.data == b"12345"


async def test_remembered_credentials_are_forgotten_with_what_accepted_them(tmp_path: Path, upstream: Upstream) -> None:
    """Hashing is spared for what was verified before; not once it is accepted no more, and not after a restart."""
    url = f"http://127.0.0.1:{upstream.port}/plain"
    hasher = argon2.PasswordHasher(time_cost=1, memory_cost=1024)
    first, second = hasher.hash("first"), hasher.hash("second")

    async def status_of(live: Live, secret: str) -> int:
        return (await live.curl(url, "--proxy-user", f"ann:{secret}")).status

    data_dir = tmp_path / "data"
    async with capture(data_dir) as proxy:
        live = Live(proxy)
        await live.set(auth_enabled=True, auth_password_hash=first)
        for _ in range(2):
            assert (await status_of(live, "first"), await status_of(live, "second")) == (200, 407)
        await live.set(auth_enabled=True, auth_password_hash=second)
        assert (await status_of(live, "first"), await status_of(live, "second")) == (407, 200)
        await live.set(auth_enabled=True, auth_password_hash=hasher.hash("first"))
        assert (await status_of(live, "first"), await status_of(live, "second")) == (200, 407)
        # Refused as a whole; what it withdraws is withdrawn all the same.
        await live.offer("global", auth_enabled=True, auth_password_hash=second, connection_timeout=0)
        await live.status(lambda status: bool(status.config_error))
        assert (await status_of(live, "first"), await status_of(live, "second")) == (407, 200)
    shutil.rmtree(data_dir / "config")
    async with capture(data_dir, "--api-url", "http://127.0.0.1:1") as proxy:
        live = Live(proxy)
        assert (await status_of(live, "first"), await status_of(live, "second")) == (407, 200)


@pytest.mark.parametrize("guarded", [True, False])
async def test_a_copy_in_another_form_stops_no_node(tmp_path: Path, upstream: Upstream, guarded: bool) -> None:
    """It asks the bus. Where the configuration decided on access, nobody is served before."""
    url = f"http://127.0.0.1:{upstream.port}/plain"
    folder = tmp_path / "data" / "last-known-good"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "capture-0").write_bytes(b"9 a form of another version")
    if guarded:
        (folder / "capture-0.guarded").write_bytes(b'["global"]')
    async with capture(tmp_path / "data", "--api-url", "http://127.0.0.1:1") as proxy:
        live = Live(proxy)
        assert ((await live.curl(url)).status == 200) is not guarded
        assert "another version" in (await live.status(lambda status: bool(status.config_error))).config_error
        await live.set(ip_blacklist="10.0.0.0/8")
        assert (await live.curl(url)).status == 200
        assert (folder / "capture-0.unreadable").read_bytes().startswith(b"9 ")
        assert any("capture-0.unreadable" in line for line in proxy.output)


@pytest.mark.parametrize("how", ["nobody is in both lists", "a scope that cannot be read"])
async def test_who_is_connected_is_not_served_either_while_nobody_is(
    tmp_path: Path, upstream: Upstream, how: str
) -> None:
    async with capture(tmp_path / "data") as proxy:
        live = Live(proxy)
        await live.set(ip_whitelist="127.0.0.0/8")
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(f"GET http://127.0.0.1:{upstream.port}/plain HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        if how == "nobody is in both lists":
            await live.offer("global", ip_whitelist="10.0.0.0/8", connection_timeout=0)
        else:
            await live.bus.put_config("app:browser", b"\0")
        await asyncio.wait_for(reader.read(-1), 30)
        assert "nobody is served" in (await live.status(lambda status: bool(status.config_error))).config_error
        await live.status(lambda status: status.counters.get("gate_refused", 0) >= 1)
        await live.offer("app:browser")
        await live.set(ip_whitelist="127.0.0.0/8")
        assert (await live.curl(f"http://127.0.0.1:{upstream.port}/plain")).status == 200
        writer.close()
