"""HTTP/2 clients that make work and transfer nothing are told to calm down, and closed; the others never notice."""

import asyncio
import contextlib
import ssl
import struct

import h2.errors
import h2.exceptions
import hpack
import pytest

from megido_capture.mitm.calm import FRAMES, RESETS
from megido_shared.events import ErrorRaised, ErrorType, FlowFailed
from tests.integration.capture import h2peer
from tests.integration.capture.harness import Proxy, curl, flows
from tests.integration.capture.test_limits import url
from tests.integration.capture.test_slow_clients import preface, secured
from tests.integration.capture.upstream import Upstream

pytestmark = pytest.mark.timeout(90)

MANY = int(FRAMES) + 1_000
PING, SETTINGS, PRIORITY, WINDOW_UPDATE, DATA, HEADERS, RESET, GOAWAY, CONTINUATION = 6, 4, 2, 8, 0, 1, 3, 7, 9


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def head(port: int, path: str = "/plain/1") -> bytes:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    found: bytes = encoder.encode(
        [(":method", "GET"), (":scheme", "https"), (":authority", f"localhost:{port}"), (":path", path)]
    )
    return found


def settings(*values: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *value) for value in values))


CALM = {
    "pings": frame(PING, 0, 0, bytes(8)) * MANY,
    "settings": settings((4, 65_535)) * MANY,
    "unknown settings": b"".join(settings((number, 1)) for number in range(100, 300)),
    "priorities": frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 1)) * MANY,
    "windows": frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * MANY,
    "unknown frames": frame(0x55, 0, 0) * MANY,
}


async def answer_to(proxy: Proxy, port: int, said: bytes) -> tuple[int | None, bytes]:
    """The code and the text that an HTTP/2 client gets with the end of its connection when it has said that."""
    reader, writer = await secured(proxy, port, "h2")
    writer.write(preface())
    found: tuple[int | None, bytes] = (None, b"")

    async def listen() -> None:
        nonlocal found
        with contextlib.suppress(ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            while True:
                start = await reader.readexactly(9)
                payload = await reader.readexactly(int.from_bytes(start[:3]))
                if start[3] == GOAWAY:
                    found = (int.from_bytes(payload[4:8]), payload[8:])

    listening = asyncio.create_task(listen())
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        for start in range(0, len(said), 65_536):
            writer.write(said[start : start + 65_536])
            await writer.drain()
    await asyncio.wait_for(listening, 30)
    writer.close()
    return found


@pytest.mark.parametrize("flood", CALM)
async def test_frames_that_carry_nothing(proxy: Proxy, upstream_tls: Upstream, upstream: Upstream, flood: str) -> None:
    code, text = await answer_to(proxy, upstream_tls.port, CALM[flood])
    assert code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM and b"too many" in text
    assert (await curl(proxy, url(upstream))).status == 200
    found = await proxy.until(lambda events: len([event for event in events if event.seq]) >= 2)
    [error] = flows(found, ErrorRaised)
    assert error.failure.error_type is ErrorType.PROTOCOL_ERROR and "too many" in error.failure.message


async def test_empty_data(proxy: Proxy, upstream_tls: Upstream) -> None:
    port = upstream_tls.port
    code, _ = await answer_to(proxy, port, frame(HEADERS, 4, 1, head(port)) + frame(DATA, 0, 1) * MANY)
    assert code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    found = await proxy.until(lambda events: any(event.seq for event in events))
    [event] = [event for event in found if event.seq]  # without a flow, if the request came in the same piece
    assert event.failure.error_type is ErrorType.PROTOCOL_ERROR and "carry nothing" in event.failure.message


@pytest.mark.parametrize("by", ["the client", "us"])
async def test_streams_that_are_reset(proxy: Proxy, upstream_tls: Upstream, by: str) -> None:
    """Each is a failed flow, up to the bound, where the connection ends; a window beyond its limit makes us reset."""
    port, asked = upstream_tls.port, head(upstream_tls.port)
    kind, value = (RESET, 8) if by == "the client" else (WINDOW_UPDATE, 2**31 - 1)
    said = b"".join(
        frame(HEADERS, 5, number, asked) + frame(kind, 0, number, struct.pack(">I", value))
        for number in range(1, 4 * int(RESETS), 2)
    )
    code, text = await answer_to(proxy, port, said)
    assert code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM and b"reset" in text
    found = await proxy.until(lambda events: len(flows(events, FlowFailed)) + len(flows(events)) >= RESETS)
    assert len(flows(found, FlowFailed)) + len(flows(found)) < 1.5 * RESETS


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1 << 20), h2.errors.ErrorCodes.PROTOCOL_ERROR),
        (frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1) * 100, h2.errors.ErrorCodes.PROTOCOL_ERROR),
        (frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1, bytes(1 << 17)) * 20, None),
    ],
    ids=["a frame of 16 MB", "empty continuations", "a block of 2 MB"],
)
async def test_what_never_ends_is_not_collected(proxy: Proxy, upstream_tls: Upstream, said: bytes, code: int) -> None:
    """The end comes though not half of what was announced has."""
    found, _ = await answer_to(proxy, upstream_tls.port, said)
    assert found == code or code is None
    [error] = flows(await proxy.until(lambda events: bool(flows(events, ErrorRaised))), ErrorRaised)
    assert error.failure.error_type is ErrorType.PROTOCOL_ERROR


async def test_a_busy_client_may_ask_for_more(proxy: Proxy, upstream_tls: Upstream) -> None:
    """One that opens its windows after each frame, with a ping beside, reads as much as it likes."""
    peer = await h2peer.connect(proxy, upstream_tls.port)
    frames = 0

    def piecemeal(number: int) -> None:
        nonlocal frames
        frames += 1
        stream = peer.streams[number]
        size, stream.unread = stream.unread, 0
        peer.conn.ping(bytes(8))
        if size:
            peer.conn.increment_flow_control_window(size)
        with contextlib.suppress(h2.exceptions.StreamClosedError):  # it ended with this piece
            peer.conn.increment_flow_control_window(size or 1, number)

    peer._acknowledge = piecemeal  # type: ignore[method-assign]
    for number in (1, 3, 5):
        await peer.head(number, h2peer.request(upstream_tls.port, "/length/10000000"), end=True)
    await peer.until(lambda: peer.task.done() or sum(stream.ended for stream in peer.streams.values()) == 3)
    assert frames * 3 > FRAMES and not any(stream.reset for stream in peer.streams.values())
    await peer.close()
