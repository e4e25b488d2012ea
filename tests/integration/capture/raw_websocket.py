"""WebSocket peers that write frames of their own, right or wrong, over bare sockets (RFC 6455)."""

import asyncio
import contextlib
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from tests.integration.capture.harness import Proxy

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
CONTINUATION = 0
SECONDS = 20.0
"""In which a peer must have come to an end."""

_MASK = b"mask"
_ANSWER = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: any\r\n"
)


def frame(opcode: int, payload: bytes = b"", *, mask: bool = True, last: bool = True, deflated: bool = False) -> bytes:
    """One frame; `mask` is for what a client sends."""
    size = len(payload)
    head = bytes([last << 7 | deflated << 6 | opcode, mask << 7 | (size if size < 126 else 126)])
    if size >= 126:
        head += struct.pack("!H", size)
    if not mask:
        return head + payload
    return head + _MASK + bytes(byte ^ _MASK[at % 4] for at, byte in enumerate(payload))


def close(code: int | None = None, reason: bytes = b"", *, mask: bool = True) -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason, mask=mask)


def deflated(payload: bytes) -> bytes:
    """A message's payload as RFC 7692 writes it."""
    maker = zlib.compressobj(wbits=-15)
    return (maker.compress(payload) + maker.flush(zlib.Z_SYNC_FLUSH))[:-4]


@dataclass(frozen=True)
class Received:
    """What a peer read until the connection ended: messages and control frames, a message's fragments joined."""

    frames: tuple[tuple[int, bytes], ...]

    @property
    def close(self) -> tuple[int, bytes] | None:
        """Code and reason of the CLOSE, code 1005 when it had none; None: there was no CLOSE (1006)."""
        for opcode, payload in self.frames:
            if opcode == CLOSE:
                return (int.from_bytes(payload[:2]), payload[2:]) if payload else (1005, b"")
        return None


class Peer:
    """One side of a connection after its handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    def reset(self) -> None:
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def frame(self) -> tuple[int, bytes, bool, bool]:
        """Opcode, payload, whether it is the message's last frame, whether it is compressed."""
        first, second = await self.reader.readexactly(2)
        size = second & 127
        if size == 126:
            (size,) = struct.unpack("!H", await self.reader.readexactly(2))
        mask = await self.reader.readexactly(4) if second & 128 else bytes(4)
        payload = await self.reader.readexactly(size)
        return first & 15, bytes(b ^ mask[at % 4] for at, b in enumerate(payload)), bool(first & 128), bool(first & 64)

    async def until_end(self) -> Received:
        """Reads to the end of the connection, closes it, and says what came."""
        found: list[tuple[int, bytes]] = []
        inflater = zlib.decompressobj(-15)
        message, kind, packed = b"", 0, False
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(SECONDS):
                while True:
                    opcode, payload, last, compressed = await self.frame()
                    if opcode >= CLOSE:
                        found.append((opcode, payload))
                        continue
                    if opcode != CONTINUATION:
                        message, kind, packed = b"", opcode, compressed
                    message += payload
                    if last:
                        whole = inflater.decompress(message + b"\x00\x00\xff\xff") if packed else message
                        found.append((kind, whole))
        self.writer.close()
        return Received(tuple(found))


async def client(proxy: Proxy, port: int, *, head: Sequence[str] = ()) -> Peer:
    """Through the proxy to the server on `port`; compression is offered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    lines = (
        f"GET http://127.0.0.1:{port}/raw HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        *head,
    )
    writer.write("\r\n".join((*lines, "", "")).encode())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return Peer(reader, writer)


class Server:
    """Accepts every handshake, with `extension`; `frames` go out in one write with its answer. The peers of accepted
    connections are in `peers`."""

    def __init__(self, extension: str = "", frames: bytes = b"") -> None:
        self.port = 0
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        negotiated = f"Sec-WebSocket-Extensions: {extension}\r\n" if extension else ""
        self._answer = f"{_ANSWER}{negotiated}\r\n".encode() + frames

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._answer)
        await self.peers.put(Peer(reader, writer))

    async def peer(self) -> Peer:
        return await asyncio.wait_for(self.peers.get(), SECONDS)


@contextlib.asynccontextmanager
async def serving(extension: str = "", frames: bytes = b"") -> AsyncIterator[Server]:
    made = Server(extension, frames)
    listening = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.port = listening.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listening.close()
