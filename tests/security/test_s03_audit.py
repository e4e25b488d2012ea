"""Line 3: every attempt is audited, and a flood of them fills no journal, no memory and no connection."""

import asyncio
import re
from pathlib import Path
from typing import Any

import argon2
import pytest

from megido_shared.events import AuthAttempted, NodeStatus
from tests.integration.capture.harness import capture, flows, read_events, until
from tests.integration.capture.upstream import Upstream
from tests.support.inside import Inside, inside

pytestmark = pytest.mark.timeout(120)

GET = "GET http://example.org/ HTTP/1.1"
CONNECT = "CONNECT example.org:443 HTTP/1.1"
TOO_OFTEN = 10


def attempts(found: list[Any]) -> int:
    return sum(event.attempts for event in flows(found, AuthAttempted) if not event.success)


async def asked_until_closed(port: int, line: str, *fields: str) -> list[bytes]:
    """The heads of the answers to one request after the other, on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heads = list[bytes]()
    try:
        while True:
            writer.write("\r\n".join([line, "Host: x", *fields, "", ""]).encode())
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).lower()
            heads.append(head)
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            if b"connection: close" in head:
                assert await asyncio.wait_for(reader.read(), 20) == b""
                return heads
    finally:
        writer.close()


@pytest.mark.parametrize("line", [GET, CONNECT])
@pytest.mark.parametrize("fast", ["--fastpath", "--no-fastpath"])
async def test_a_connection_ends_with_its_tenth_refusal(tmp_path: Path, line: str, fast: str) -> None:
    async with capture(tmp_path, "--auth-required", fast, PROXY_AUTH_TOKEN="right") as proxy:
        for fields in ((), ("Proxy-Authorization: Bearer wrong",)):
            heads = await asked_until_closed(proxy.port, line, *fields)
            assert [b" 407 " in head for head in heads] == [True] * TOO_OFTEN
            assert [b"connection: close" in head for head in heads] == [False] * (TOO_OFTEN - 1) + [True]
        await proxy.until(lambda found: attempts(found) == 2 * TOO_OFTEN)


async def test_nine_refusals_are_no_reason_not_to_let_somebody_in(tmp_path: Path, upstream: Upstream) -> None:
    async with inside(tmp_path, auth_required=True, auth_token="right") as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        line = f"GET http://127.0.0.1:{upstream.port}/plain HTTP/1.1\r\nHost: x\r\n"
        for number in range(TOO_OFTEN):
            token = "right" if number == TOO_OFTEN - 1 else "wrong"
            writer.write(f"{line}Proxy-Authorization: Bearer {token}\r\n\r\n".encode())
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).lower()
            if token != "right":
                length = re.search(rb"content-length: (\d+)", head)
                assert b" 407 " in head and length is not None
                await reader.readexactly(int(length[1]))
        assert b" 200 " in head
        writer.close()


async def test_a_flood_is_few_events_with_every_attempt_in_one(tmp_path: Path) -> None:
    connections = 200
    async with inside(tmp_path, auth_required=True, auth_token="right") as proxy:
        for _ in range(connections // 20):
            await asyncio.gather(*(asked_until_closed(proxy.port, GET) for _ in range(20)))
        found = await proxy.until(lambda found: attempts(found) >= connections * TOO_OFTEN)
        assert attempts(found) == connections * TOO_OFTEN == proxy.node.parts.counters["auth_refused"]
        assert len(flows(found, AuthAttempted)) < connections


async def test_a_stop_writes_what_is_summed(tmp_path: Path) -> None:
    async with capture(tmp_path, "--auth-required", PROXY_AUTH_TOKEN="right") as proxy:
        await asyncio.gather(*(asked_until_closed(proxy.port, GET) for _ in range(20)))
    found = await read_events(tmp_path)
    assert attempts(found) == 20 * TOO_OFTEN
    counted = max(event.counters.get("auth_refused", 0) for event in flows(found, NodeStatus))
    assert counted == 20 * TOO_OFTEN
    # The last heartbeat counts them too.
    assert flows(found, NodeStatus)[-1].captured == max(event.seq for event in found)


async def test_refused_addresses_are_summed_too(tmp_path: Path) -> None:
    async with inside(tmp_path, ip_blacklist="127.0.0.3") as proxy:

        async def refused() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=("127.0.0.3", 0))
            writer.write(f"{GET}\r\n\r\n".encode())
            assert b" 403 " in await reader.readuntil(b"\r\n\r\n")
            writer.close()

        await asyncio.gather(*(refused() for _ in range(80)))
        found = flows(await proxy.until(lambda found: attempts(found) >= 80), AuthAttempted)
        assert attempts(found) == 80 and len(found) < 40
        assert {event.client.ip for event in found} == {"127.0.0.3"}


@pytest.mark.parametrize("line", [GET, CONNECT])
async def test_clients_that_leave_while_they_are_judged_leave_nothing(tmp_path: Path, line: str) -> None:
    cheap = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=cheap.hash("right"))
        for number in range(60):
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=(f"127.3.0.{number + 1}", 0))
            writer.write(f"{line}\r\nHost: x\r\nProxy-Authorization: Bearer {number}\r\n\r\n".encode())
            if number % 2:
                writer.write_eof()
            else:
                writer.transport.abort()
        await proxy.until(lambda found: attempts(found) >= 30)  # an abort may be quicker than what was sent
        await until(lambda: _left(proxy), lambda left: not any(left))


async def _left(proxy: Inside) -> list[Any]:
    access, registry = proxy.node.parts.access, proxy.node.parts.registry
    return [registry.clients, registry.refused, registry.flows, access._refused, access._tunnels]
