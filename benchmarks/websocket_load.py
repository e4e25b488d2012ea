"""One WebSocket connection over which as many messages go as are asked for: a client, and the server that echoes."""

import asyncio
import struct
from collections.abc import Callable
from typing import cast

TEXT = 0x81
MASK = b"\x37\xfa\x21\x3d"
PAYLOAD = ("0123456789 Hellø " * 12)[:196].encode()
HANDSHAKE = (
    "GET http://127.0.0.1:{port}/endure HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)
AT_ONCE = 16
"""Messages on their way at a time."""
FLIGHT = 60.0
"""Seconds after which an echo that has not come is taken for lost."""


def frame(payload: bytes, *, masked: bool) -> bytes:
    """A text message in one frame (RFC 6455, 5.2)."""
    head = bytes([TEXT, masked << 7 | 126]) + struct.pack("!H", len(payload))
    if not masked:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[at % 4] for at, byte in enumerate(payload))


PLAIN = frame(PAYLOAD, masked=False)


class Echo(asyncio.Protocol):
    """Answers the handshake, then each message with the same: a proxy masks anew, so only lengths are looked at."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.rest = b""
        self.open = False

    def data_received(self, data: bytes) -> None:
        self.rest += data
        if not self.open:
            head, found, self.rest = self.rest.partition(b"\r\n\r\n")
            if not found:
                self.rest = head
                return
            self.open = True
            self.transport.write(ANSWER)
        size = len(PLAIN) + len(MASK)
        whole = len(self.rest) // size
        if whole:
            self.rest = self.rest[whole * size :]
            self.transport.write(PLAIN * whole)


async def converse(proxy: int, server: int, messages: int, progress: Callable[[int], None]) -> int:
    """Sends and has back until at least `messages` went over the connection, both ways together; how many did.
    Every echo is compared with what was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
    writer.write(HANDSHAKE.format(port=server).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 101 " in head, head
    sent, expected = frame(PAYLOAD, masked=True) * AT_ONCE, PLAIN * AT_ONCE
    done = 0
    while done < messages:
        writer.write(sent)
        async with asyncio.timeout(FLIGHT):
            got = await reader.readexactly(len(expected))
        assert got == expected, "an echo differs"
        done += 2 * AT_ONCE
        progress(done)
    writer.write(bytes([0x88, 0x82]) + MASK + bytes(byte ^ MASK[at] for at, byte in enumerate(b"\x03\xe8")))
    await reader.read()
    writer.close()
    return done
