"""Bodies too large to hold: a server that makes or hashes them as they pass, over HTTP/1.1 and HTTP/2, and curl."""

import asyncio
import contextlib
import hashlib
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions

BLOCK = hashlib.shake_256(b"megido").digest(1 << 16)
CHUNK = len(BLOCK)
IN_FLIGHT = 4 << 20


def pieces(size: int) -> Iterator[bytes]:
    """`size` bytes of which no two blocks are the same: one lost or doubled shows in the hash."""
    for number in range(-(-size // CHUNK)):
        yield (number.to_bytes(8) + BLOCK[8:])[: size - number * CHUNK]


def hash_of(size: int) -> str:
    found = hashlib.sha256()
    for piece in pieces(size):
        found.update(piece)
    return found.hexdigest()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """`GET /<size>` answers with so many bytes, an upload with the hash of what came, in hexadecimal."""
    tls = writer.get_extra_info("ssl_object")
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
        if tls is not None and tls.selected_alpn_protocol() == "h2":
            await _Http2(reader, writer).serve()
        else:
            while True:
                await _exchange(reader, writer)
    writer.close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    method, path, _ = head.split(b" ", 2)
    if method == b"GET":
        size = int(path.rpartition(b"/")[2])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % size)
        for piece in pieces(size):
            writer.write(piece)
            await writer.drain()
        return
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    left, found = int(lengths[0]), hashlib.sha256()
    while left:
        piece = await reader.read(min(left, 1 << 18))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        found.update(piece)
    answer = found.hexdigest().encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))


class _Http2:
    """One connection, one stream at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.hash = hashlib.sha256()
        self.sending: Iterator[bytes] | None = None
        self.rest = b""
        self.stream = 0

    async def serve(self) -> None:
        self.conn.initiate_connection()
        self.conn.increment_flow_control_window(IN_FLIGHT)
        self.writer.write(self.conn.data_to_send())
        while data := await self.reader.read(1 << 18):
            for event in self.conn.receive_data(data):
                self._handle(event)
            await self._send()

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            headers = dict(event.headers)
            self.stream, self.hash = event.stream_id, hashlib.sha256()
            if headers[":method"] == "GET":
                size = int(headers[":path"].rpartition("/")[2])
                self._answer(size)
                self.sending, self.rest = pieces(size), b""
        elif isinstance(event, h2.events.DataReceived):
            self.hash.update(event.data)
            self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded) and self.sending is None:
            answer = self.hash.hexdigest().encode()
            self._answer(len(answer))
            self.conn.send_data(self.stream, answer, end_stream=True)
        elif isinstance(event, h2.events.StreamReset):
            self.sending = None

    def _answer(self, size: int) -> None:
        self.conn.send_headers(self.stream, [(":status", "200"), ("content-length", str(size))])

    async def _send(self) -> None:
        while self.sending is not None:
            if not self.rest:
                self.rest = next(self.sending, b"")
                if not self.rest:
                    self.sending = None
                    self.conn.end_stream(self.stream)
                    break
            room = min(self.conn.local_flow_control_window(self.stream), self.conn.max_outbound_frame_size)
            if not room:
                break
            self.conn.send_data(self.stream, self.rest[:room])
            self.rest = self.rest[room:]
            self.writer.write(self.conn.data_to_send())
            await self.writer.drain()
        self.writer.write(self.conn.data_to_send())
        await self.writer.drain()


def curl(proxy: int, authority: Path, version: str, *arguments: str) -> list[str]:
    """The command; `version` is http1.1 or http2."""
    command = ["curl", "-sS", "-f", f"--{version}", "-x", f"http://127.0.0.1:{proxy}", "--cacert", str(authority)]
    return [*command, "-m", "1800", "-H", "Expect:", *arguments]


def download(command: list[str], progress: Callable[[int], None]) -> str:
    """The hash of what curl wrote."""
    found, done = hashlib.sha256(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := process.stdout.read(1 << 20):
            found.update(piece)
            done += len(piece)
            progress(done)
    assert process.returncode == 0, f"curl: {process.returncode}"
    return found.hexdigest()


def upload(command: list[str], size: int, progress: Callable[[int], None]) -> str:
    """What the server answered: the hash of what it got."""
    declared = ["-X", "POST", "-H", f"Content-Length: {size}", "-H", "Transfer-Encoding:", "-T", "-"]
    done = 0
    with subprocess.Popen([*command, *declared], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for piece in pieces(size):
            process.stdin.write(piece)
            done += len(piece)
            if done % (1 << 20) < CHUNK:
                progress(done)
        process.stdin.close()
        answer = process.stdout.read().decode()
    assert process.returncode == 0, f"curl: {process.returncode}"
    return answer
