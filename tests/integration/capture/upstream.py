"""Servers for the proxy to talk to: each path behaves in one way that a test is about."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import h2.config
import h2.connection
import h2.events

PIECE = b"0123456789abcdef" * 256  # 4 KiB


class Upstream:
    """HTTP/1.1 (and h2 when offered by ALPN) on loopback. `seen` holds the raw heads of HTTP/1 requests."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[bytes] = []
        self.bodies: list[bytes] = []
        self.release = asyncio.Event()
        """Streams stop half-way until this is set."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            tls = writer.get_extra_info("ssl_object")
            if tls is not None and tls.selected_alpn_protocol() == "h2":
                await _serve_h2(reader, writer)
            else:
                while await self._exchange(reader, writer):
                    pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        self.seen.append(head)
        body = await _body(head, reader)
        self.bodies.append(body)
        path = head.split(b" ", 2)[1].decode("latin-1")
        name, _, argument = path.strip("/").partition("/")
        behave = getattr(self, f"do_{name.partition('?')[0]}", self.do_plain)
        return bool(await behave(writer, argument, head, body))

    async def do_plain(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        answer = b'{"answer": "' + argument.encode() + b'"}'
        writer.write(_head(b"Content-Type: application/json", b"X-Two: 1", b"x-two: 2", length=len(answer)) + answer)
        return True

    async def do_echo(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        writer.write(_head(length=len(head) + len(body)) + head + body)
        return True

    async def do_count(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        answer = str(len(body)).encode()
        writer.write(_head(length=len(answer)) + answer)
        return True

    async def do_length(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        size = int(argument.partition("?")[0])
        writer.write(_head(length=size))
        await self._pieces(writer, size)
        return True

    async def do_chunked(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        writer.write(_head(b"Transfer-Encoding: chunked"))
        for piece in _split(int(argument.partition("?")[0])):
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        return True

    async def do_sse(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        writer.write(_head(b"Content-Type: text/event-stream", b"Transfer-Encoding: chunked"))
        for number in range(int(argument.partition("?")[0])):
            event = b"data: %d\n\n" % number
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            if number == 0:
                await self.release.wait()
        writer.write(b"0\r\n\r\n")
        return True

    async def do_close(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        writer.write(_head(b"Connection: close"))
        size = int(argument.partition("?")[0])
        writer.write(PIECE[: min(size, len(PIECE))])
        await writer.drain()
        await self.release.wait()
        await self._pieces(writer, max(0, size - len(PIECE)))
        return False

    async def do_resethead(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        _reset(writer)
        return False

    async def do_resetbody(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        writer.write(_head(length=1_000_000) + PIECE)
        await writer.drain()
        await asyncio.sleep(0.05)
        _reset(writer)
        return False

    async def do_hang(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        await self.release.wait()
        return False

    async def do_slow(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        await self.release.wait()
        return await self.do_plain(writer, argument, head, body)

    async def do_garbage(self, writer: asyncio.StreamWriter, argument: str, head: bytes, body: bytes) -> bool:
        writer.write(b"this is no HTTP\r\n\r\n")
        return False

    async def _pieces(self, writer: asyncio.StreamWriter, size: int) -> None:
        for piece in _split(size):
            writer.write(piece)
            await writer.drain()


@contextlib.asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Upstream]:
    upstream = Upstream()
    upstream.release.set()
    server = await asyncio.start_server(upstream.handle, "127.0.0.1", 0, ssl=tls)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        upstream.release.set()
        server.close()


@contextlib.contextmanager
def full_backlog() -> Any:
    """A port whose connects hang: it listens, accepts nothing, and its queue is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = []
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        fillers.append(filler)
    try:
        yield listener.getsockname()[1]
    finally:
        for item in (*fillers, listener):
            item.close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def body_of_size(size: int) -> bytes:
    return b"".join(_split(size))


def _split(size: int) -> list[bytes]:
    whole, rest = divmod(size, len(PIECE))
    return [PIECE] * whole + ([PIECE[:rest]] if rest else [])


def _head(*lines: bytes, length: int | None = None) -> bytes:
    extra = (b"Content-Length: %d" % length,) if length is not None else ()
    return b"\r\n".join((b"HTTP/1.1 200 OK", *lines, *extra)) + b"\r\n\r\n"


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readline()
        return b"".join(parts)
    for line in lower.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.split(b":")[1]))
    return b""


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


async def _serve_h2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each stream as its path says."""
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    conn.initiate_connection()
    writer.write(conn.data_to_send())
    paths: dict[int, str] = {}
    received: dict[int, int] = {}
    waiting: dict[int, memoryview] = {}
    while data := await reader.read(65536):
        for event in conn.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                paths[event.stream_id] = dict(event.headers)[":path"]
                received[event.stream_id] = 0
            elif isinstance(event, h2.events.DataReceived):
                received[event.stream_id] += len(event.data)
                conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                waiting.pop(event.stream_id, None)
            elif isinstance(event, h2.events.StreamEnded):
                headers, answer = _h2_answer(paths.pop(event.stream_id), received.pop(event.stream_id))
                conn.send_headers(event.stream_id, headers)
                waiting[event.stream_id] = memoryview(answer)
        send_what_fits(conn, waiting)
        writer.write(conn.data_to_send())
        await writer.drain()


def _h2_answer(path: str, received: int) -> tuple[list[tuple[str, str]], bytes]:
    """Headers and body: the path, or what the handlers of HTTP/1 answer under the same name; `/nolength/…`,
    `/chunked/…` and `/sse/…` without Content-Length."""
    name, _, argument = path.strip("/").partition("/")
    number = argument.partition("?")[0]
    answer, content_type = f"h2 {path}".encode(), "text/plain"
    match name:
        case "length" | "chunked":
            answer = body_of_size(int(number))
        case "sse":
            answer, content_type = b"".join(b"data: %d\n\n" % n for n in range(int(number))), "text/event-stream"
        case "count":
            answer = str(received).encode()
    headers = [(":status", "200"), ("content-type", content_type)]
    if name not in ("nolength", "chunked", "sse"):
        headers.append(("content-length", str(len(answer))))
    return headers, answer


def send_what_fits(conn: h2.connection.H2Connection, waiting: dict[int, memoryview]) -> None:
    """Sends of each stream's body what flow control allows, and takes away what is sent."""
    for stream in list(waiting):
        while stream in waiting:
            rest = waiting[stream]
            room = min(conn.local_flow_control_window(stream), conn.max_outbound_frame_size)
            if not room and rest:
                break
            conn.send_data(stream, bytes(rest[:room]), end_stream=len(rest) <= room)
            waiting[stream] = rest[room:]
            if len(rest) <= room:
                del waiting[stream]
