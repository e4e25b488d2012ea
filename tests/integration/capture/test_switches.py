"""The switches of logging, turned while traffic flows."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import pytest
import websockets

from megido_shared.events import AuthAttempted, FlowStarted, WebSocketMessage
from tests.integration.capture.harness import body, curl, flows
from tests.integration.capture.upstream import Upstream, body_of_size, closed_port
from tests.support.inside import Inside, inside

LARGE = 700_001
"""Bytes: streams, in several chunks."""


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Inside]:
    async with inside(tmp_path / "data") as found:
        yield found


async def test_off_lets_everything_pass_and_records_nothing(proxy: Inside, upstream: Upstream) -> None:
    proxy.apply(logging_enabled=False)
    base = f"http://127.0.0.1:{upstream.port}"
    assert (await curl(proxy, f"{base}/echo", "-d", "small")).body.endswith(b"small")
    for framing in ("length", "chunked", "close"):
        assert (await curl(proxy, f"{base}/{framing}/{LARGE}")).body == body_of_size(LARGE)
    assert (await curl(proxy, f"{base}/resetbody")).code != 0
    assert (await curl(proxy, f"http://127.0.0.1:{closed_port()}/")).status == 502
    assert (await curl(proxy, f"https://127.0.0.1:{closed_port()}/")).code != 0
    async with _echo() as url, websockets.connect(url, proxy=proxy.url) as socket:
        await socket.send("unseen")
        assert await socket.recv() == "unseen"
    assert await proxy.events() == []
    assert proxy.node.parts.counters["unrecorded"] >= 6 and not proxy.node.parts.registry.flows

    proxy.apply(logging_enabled=True)
    assert (await curl(proxy, f"{base}/plain/seen")).status == 200
    [flow] = flows(await proxy.events())
    assert flow.request.target == b"/plain/seen" and flow.seq == 1  # accounting has no hole


async def test_a_socket_opened_while_off_stays_unrecorded(proxy: Inside) -> None:
    proxy.apply(logging_enabled=False)
    async with _echo() as url, websockets.connect(url, proxy=proxy.url) as socket:
        proxy.apply(logging_enabled=True)
        await socket.send("its connection is unknown")
        await socket.recv()
    assert await proxy.events() == []


async def test_turned_off_in_the_middle_a_socket_ends_recorded(proxy: Inside) -> None:
    """Without its CLOSE the next start would take it for one whose proxy was killed."""
    async with _echo() as url, websockets.connect(url, proxy=proxy.url) as socket:
        await socket.send("seen")
        await socket.recv()
        proxy.apply(websocket_enabled=False)
        await socket.send("unseen")
        await socket.recv()
    found = await proxy.until(lambda found: any(_is_close(event) for event in found))
    recorded = [event for event in found if isinstance(event, WebSocketMessage)]
    assert [(event.message_type, event.sequence) for event in recorded] == [("TEXT", 0), ("TEXT", 1), ("CLOSE", 4)]
    assert recorded[-1].close_code == 1000


def _is_close(event: object) -> bool:
    return isinstance(event, WebSocketMessage) and event.message_type == "CLOSE"


@pytest.mark.parametrize("framing", ["close", "sse"])
async def test_turned_off_in_the_middle_a_flow_ends_recorded(proxy: Inside, upstream: Upstream, framing: str) -> None:
    upstream.release.clear()
    fetching = asyncio.create_task(curl(proxy, f"http://127.0.0.1:{upstream.port}/{framing}/9000"))
    await proxy.until(lambda found: bool(flows(found, FlowStarted)))
    proxy.apply(logging_enabled=False, log_response_body=False, max_body_size=0)
    upstream.release.set()
    answer = await fetching
    found = await proxy.until(lambda found: bool(flows(found)))
    [flow] = flows(found)
    assert body(found, flow) == answer.body and not flow.response.body.truncated


async def test_turned_on_in_the_middle_a_flow_stays_unrecorded(proxy: Inside, upstream: Upstream) -> None:
    proxy.apply(logging_enabled=False)
    upstream.release.clear()
    fetching = asyncio.create_task(curl(proxy, f"http://127.0.0.1:{upstream.port}/close/9000"))
    while not proxy.node.parts.registry.flows:
        await asyncio.sleep(0.01)
    proxy.apply(logging_enabled=True)
    upstream.release.set()
    assert len((await fetching).body) == 9000
    assert await proxy.events() == []


async def test_attempts_at_access_are_recorded_always(tmp_path: Path, upstream: Upstream) -> None:
    options = {"auth_required": True, "auth_token": "letmein", "logging_enabled": False}
    async with inside(tmp_path / "data", **options) as proxy:
        refused = await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")
        allowed = await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain", "--proxy-user", "me:letmein")
        found = await proxy.events()
    assert (refused.status, allowed.status) == (407, 200)
    assert [type(event) for event in found] == [AuthAttempted, AuthAttempted]
    assert [event.success for event in found] == [False, True]


@pytest.mark.parametrize("size", [300, LARGE])
@pytest.mark.parametrize("kept", ["request", "response", "neither"])
async def test_a_body_that_is_not_logged_leaves_size_and_hash(
    proxy: Inside, upstream: Upstream, tmp_path: Path, kept: str, size: int
) -> None:
    sent = {"request": (b"secret of the client/" * (size // 21 + 1))[:size], "response": body_of_size(size)}
    (tmp_path / "upload").write_bytes(sent["request"])
    proxy.apply(log_request_body=kept == "request", log_response_body=kept == "response")
    url = f"http://127.0.0.1:{upstream.port}/length/{size}"
    answer = await curl(proxy, url, "--data-binary", f"@{tmp_path}/upload", "-H", "Expect:")
    assert answer.body == sent["response"] and upstream.bodies == [sent["request"]]
    found = await proxy.events()
    [flow] = flows(found)
    files = b"".join(path.read_bytes() for path in proxy.data_dir.rglob("*") if path.is_file())
    for side, stored in (("request", flow.request.body), ("response", flow.response.body)):
        assert stored.size == size
        assert stored.truncated == (side != kept)
        assert (sent[side][:40] in files) == (side == kept)
        if side == kept:
            assert body(found, flow, side) == sent[side]
        else:
            assert (stored.data, stored.chunks, stored.sha256) == (b"", 0, sha256(sent[side]).digest())


def _open_flows(proxy: Inside) -> Callable[[], Awaitable[int]]:
    async def count() -> int:
        return len(proxy.node.parts.registry.flows)

    return count


@contextlib.asynccontextmanager
async def _echo() -> AsyncIterator[str]:
    async def answer(socket: websockets.ServerConnection) -> None:
        async for message in socket:
            await socket.send(message)

    async with websockets.serve(answer, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
