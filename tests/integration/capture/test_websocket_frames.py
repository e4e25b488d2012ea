"""WebSocket frames as they come on the wire: every kind, both ways, fragmented and compressed, right and wrong."""

import asyncio
import zlib
from typing import Any

import pytest

from megido_shared.events import WebSocketMessage
from tests.integration.capture.harness import Proxy, flows
from tests.integration.capture.raw_websocket import (
    BINARY,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Received,
    client,
    close,
    deflated,
    frame,
    serving,
)

DEFLATE = "permessage-deflate"
WORDS = b"compressed and fragmented, " * 40
ACCENT = "é".encode()


def messages(found: list[Any]) -> list[WebSocketMessage]:
    return flows(found, WebSocketMessage)


def ended(found: list[Any]) -> bool:
    return any(message.message_type == "CLOSE" for message in messages(found))


async def converse(proxy: Proxy, sender: str, extension: str, frames: list[bytes]) -> tuple[Received, Received, Any]:
    """Sends `frames` from one side; what that side had back, what the other side got, and what was recorded."""
    async with serving(extension) as server:
        ours = await client(proxy, server.port)
        theirs = await server.peer()
        here, there = (ours, theirs) if sender == "client" else (theirs, ours)
        for piece in frames:
            await here.send(piece)
        back, got = await asyncio.gather(here.until_end(), there.until_end())
    return back, got, messages(await proxy.until(ended))


def masked(sender: str) -> dict[str, bool]:
    return {"mask": sender == "client"}


def fragments_around_a_ping(sender: str) -> list[bytes]:
    packed, how = deflated(WORDS), masked(sender)
    return [
        frame(TEXT, packed[:9], last=False, deflated=True, **how),
        frame(PING, b"between", **how),
        frame(CONTINUATION, packed[9:15], last=False, **how),
        frame(PONG, b"again", **how),
        frame(CONTINUATION, packed[15:], **how),
        frame(BINARY, deflated(b"next"), deflated=True, **how),
        close(1000, **how),
    ]


def plain_frames(sender: str) -> list[bytes]:
    how = masked(sender)
    return [
        frame(TEXT, **how),
        frame(PING, **how),
        frame(BINARY, bytes(range(256)), **how),
        frame(TEXT, ACCENT[:1], last=False, **how),
        frame(CONTINUATION, ACCENT[1:], **how),
        frame(PONG, b"unasked", **how),
        close(1000, **how),
    ]


PLAIN = [("TEXT", b""), ("PING", b""), ("BINARY", bytes(range(256))), ("TEXT", ACCENT), ("PONG", b"unasked")]
PACKED = [("PING", b"between"), ("PONG", b"again"), ("TEXT", WORDS), ("BINARY", b"next")]
NAMES = {TEXT: "TEXT", BINARY: "BINARY", PING: "PING", PONG: "PONG"}


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize(
    ("extension", "make", "expected"),
    [
        ("", plain_frames, PLAIN),
        (DEFLATE, plain_frames, PLAIN),
        (DEFLATE, fragments_around_a_ping, PACKED),
        (f"{DEFLATE}; server_max_window_bits=10; client_max_window_bits=9", fragments_around_a_ping, PACKED),
        (f"{DEFLATE}; server_max_window_bits=8; client_max_window_bits=8", fragments_around_a_ping, PACKED),
    ],
    ids=["plain", "uncompressed", "compressed", "narrow", "window of 8"],
)
async def test_every_frame_is_relayed_and_recorded(
    proxy: Proxy, sender: str, extension: str, make: Any, expected: list[tuple[str, bytes]]
) -> None:
    _, got, recorded = await converse(proxy, sender, extension, make(sender))
    assert [(NAMES[kind], payload) for kind, payload in got.frames[:-1]] == expected
    assert got.close == (1000, b"")
    direction = "SEND" if sender == "client" else "RECEIVE"
    assert [(m.direction, m.message_type, m.payload) for m in recorded] == [
        *((direction, kind, payload) for kind, payload in expected),
        (direction, "CLOSE", b""),
    ]
    assert [m.sequence for m in recorded] == list(range(len(recorded)))
    assert [m.size for m in recorded] == [len(m.payload) for m in recorded]


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize("takeover", [True, False])
async def test_messages_that_share_a_dictionary_and_messages_that_do_not(
    proxy: Proxy, sender: str, takeover: bool
) -> None:
    """With context takeover the second message refers to the first (RFC 7692, 7.1.1)."""
    parameters = "" if takeover else "; server_no_context_takeover; client_no_context_takeover"
    shared = zlib.compressobj(wbits=-15)
    pieces = []
    for _ in range(3):
        maker = shared if takeover else zlib.compressobj(wbits=-15)
        pieces.append((maker.compress(WORDS) + maker.flush(zlib.Z_SYNC_FLUSH))[:-4])
    assert (len(pieces[1]) < len(pieces[0])) == takeover
    how = masked(sender)
    frames = [*(frame(TEXT, piece, deflated=True, **how) for piece in pieces), close(1000, **how)]
    _, got, recorded = await converse(proxy, sender, DEFLATE + parameters, frames)
    assert [m.payload for m in recorded] == [WORDS, WORDS, WORDS, b""]
    assert len(got.frames) == 4


async def test_frames_that_come_with_the_answer_to_the_handshake(proxy: Proxy) -> None:
    early = frame(TEXT, b"at once", mask=False) + close(1000, mask=False)
    async with serving(frames=early) as server:
        got = await (await client(proxy, server.port)).until_end()
    assert got.frames == ((TEXT, b"at once"), (8, b"\x03\xe8"))
    [first, last] = messages(await proxy.until(ended))
    assert (first.direction, first.payload, first.sequence, last.sequence) == ("RECEIVE", b"at once", 0, 1)


WRONG = {
    "unknown opcode": (lambda mask: frame(5, mask=mask), 1002),
    "mask": (lambda mask: frame(TEXT, b"abc", mask=not mask), 1002),
    "no utf-8": (lambda mask: frame(TEXT, b"\xff\xfe", mask=mask), 1007),
    "compressed without being agreed on": (lambda mask: frame(TEXT, b"abc", mask=mask, deflated=True), 1002),
    "continuation of nothing": (lambda mask: frame(CONTINUATION, b"abc", mask=mask), 1002),
    "control frame in pieces": (lambda mask: frame(PING, b"abc", mask=mask, last=False), 1002),
    "control frame too long": (lambda mask: frame(PING, bytes(126), mask=mask), 1002),
    "close with a local code": (lambda mask: close(1006, mask=mask), 1002),
    "close with one byte": (lambda mask: frame(8, b"a", mask=mask), 1002),
    "reason no utf-8": (lambda mask: close(1000, b"\xff", mask=mask), 1007),
}


@pytest.mark.parametrize("sender", ["client", "server"])
@pytest.mark.parametrize("name", WRONG)
async def test_what_breaks_the_protocol_ends_the_connection_for_both(proxy: Proxy, sender: str, name: str) -> None:
    make, code = WRONG[name]
    back, got, recorded = await converse(proxy, sender, "", [make(sender == "client")])
    assert back.close is not None and got.close is not None
    assert (back.close[0], got.close[0]) == (code, code)
    [last] = recorded
    assert (last.message_type, last.close_code) == ("CLOSE", code) and last.close_reason
    assert last.direction == ("SEND" if sender == "client" else "RECEIVE")


async def test_broken_compression_is_1007_and_control_frames_are_never_compressed(proxy: Proxy) -> None:
    for wrong, code in ((frame(TEXT, b"\xff" * 8, deflated=True), 1007), (frame(PING, b"a", deflated=True), 1002)):
        back, _, _ = await converse(proxy.from_now(), "client", DEFLATE, [wrong])
        assert back.close is not None and back.close[0] == code
