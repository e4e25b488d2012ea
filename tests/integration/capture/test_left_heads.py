"""Clients that leave within a head are errors, those that leave beside one are not; nor is who is told to go."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from megido_shared.events import ErrorRaised, ErrorType
from tests.integration.capture.harness import Proxy, capture, curl, flows, read_events, until
from tests.integration.capture.test_limits import closed, connected, counted, get, url
from tests.integration.capture.upstream import Upstream

pytestmark = pytest.mark.timeout(90)

PART = b"GET http://127.0.0.1/ HTTP/1.1\r\nX: "


def errors(found: list[Any]) -> list[Any]:
    return flows(found, ErrorRaised)


async def left_alone(proxy: Proxy, upstream: Upstream) -> list[Any]:
    """The errors so far: what was sent before is read by the time that another client has its answer recorded."""
    before = len(flows(await proxy.events()))
    assert (await curl(proxy, url(upstream))).status == 200
    return errors(await proxy.until(lambda events: len(flows(events)) > before))


async def test_beside_a_head_nothing_is_wrong(proxy: Proxy, upstream: Upstream) -> None:
    for said in (b"", b"\r\n", b"\r\n\r\n", get(upstream, "plain/1"), get(upstream, "plain/1") + b"\r\n"):
        async with connected(proxy, 1, said) as [(reader, writer)]:
            if said.strip():
                await reader.readuntil(b"}")
            writer.write_eof()
            assert await closed(reader)
    assert await left_alone(proxy, upstream) == []


@pytest.mark.parametrize("part", [b"G", PART, b"\r\n\r\nGE"])
async def test_on_a_connection_that_has_served(proxy: Proxy, upstream: Upstream, part: bytes) -> None:
    async with connected(proxy, 1, get(upstream, "plain/1")) as [(reader, writer)]:
        await reader.readuntil(b"}")
        writer.write(part)
        writer.write_eof()
        assert await closed(reader)
    [event] = await left_alone(proxy, upstream)
    assert event.failure.error_type is ErrorType.CONNECTION_RESET and event.client.ip == "127.0.0.1"


async def test_a_single_byte_has_a_deadline(tmp_path: Path, upstream: Upstream) -> None:
    async with (
        capture(tmp_path, "--header-timeout", "1") as proxy,
        connected(proxy, 1, get(upstream, "plain/1")) as [(reader, writer)],
    ):
        await reader.readuntil(b"}")
        writer.write(b"G")
        assert await closed(reader)
        [event] = errors(await proxy.until(lambda events: bool(errors(events))))
        assert event.failure.error_type is ErrorType.TIMEOUT and await counted(proxy, "header_timeouts") == 1


async def test_who_is_told_to_go_has_not_left(tmp_path: Path, upstream: Upstream) -> None:
    """To make room, and when the node stops."""
    async with capture(tmp_path, "--max-concurrent-clients", "2") as proxy, connected(proxy, 2, PART) as both:
        await until(lambda: curl(proxy, url(upstream)), lambda answer: answer.status == 200)
        assert await counted(proxy, "evicted_clients") == 1
        proxy.stop()
        for reader, _ in both:
            assert await closed(reader)
    assert errors(await read_events(tmp_path)) == []


@pytest.mark.parametrize("said", [PART, b"\x16\x03\x01\x00\x10no client's hello"], ids=["heads", "handshakes"])
async def test_a_flood_of_them_is_told_in_few(tmp_path: Path, upstream: Upstream, said: bytes) -> None:
    """Of heads, and of TLS handshakes that fail: neither needs a request or a credential."""
    most = 120
    async with capture(tmp_path) as proxy:

        async def leave() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(said)
            writer.close()

        async def told() -> tuple[int, int]:
            messages = [event.failure.message for event in errors(await proxy.events())]
            sums = [found[1] for message in messages if (found := re.search(r"\((\d+) more from this", message))]
            return len(messages), sum(map(int, sums))

        async def all_seen() -> bool:
            return (await told())[0] + await counted(proxy, "errors_left_out") >= most

        for _ in range(most):
            await leave()
        await until(all_seen, bool)
        single, _ = await told()
        assert 20 <= single < most
        left_out = await counted(proxy, "errors_left_out")

        async def another() -> int:
            await leave()
            return (await told())[1]

        await until(another, lambda found: found >= left_out)
        assert (await curl(proxy, url(upstream))).status == 200
