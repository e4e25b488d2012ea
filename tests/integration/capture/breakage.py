"""Servers and clients that each break in one way, for the table of errors."""

import asyncio
import contextlib
import datetime
import fcntl
import socket
import ssl
import struct
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.connection
import h2.events
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hyperframe.frame import HeadersFrame

from tests.integration.capture.harness import DEADLINE, Proxy, environment
from tests.integration.capture.upstream import closed_port, full_backlog
from tests.support.raw_server import RawServer, Script, Talk

SEEN = b"0123456789" * 10
"""What of a body was there when it broke."""


@dataclass
class Place:
    """Where a client goes, and through what."""

    proxy: Proxy
    over: str
    """`http`, `https` (HTTP/1.1 inside a CONNECT tunnel) or `h2` (HTTP/2 inside one)."""
    port: int
    authority: trustme.CA
    host: str = "localhost"

    @property
    def url(self) -> str:
        return f"{'http' if self.over == 'http' else 'https'}://{self.host}:{self.port}/broken"


type Server = Callable[[str, trustme.CA], contextlib.AbstractAsyncContextManager[tuple[str, int]]]
"""Given what it is reached over: the host and port to go to."""
type Client = Callable[[Place], Awaitable[str]]
"""What the client got: `502`, `200, cut`, `closed`, ..."""


# --- servers -------------------------------------------------------------------------------------------------------


def speaks(script: Script, h2_script: Script | None = None) -> Server:
    """A server that follows a script, with TLS where it is reached over that, `h2_script` over HTTP/2."""

    @contextlib.asynccontextmanager
    async def made(over: str, authority: trustme.CA) -> AsyncIterator[tuple[str, int]]:
        alpn = "h2" if over == "h2" else "http/1.1"
        tls = None if over == "http" else _context(authority.issue_cert("localhost"), alpn)
        chosen = h2_script if over == "h2" and h2_script else script
        async with RawServer(chosen, tls=tls) as server:
            yield "localhost", server.port

    return made


def certified(make: Callable[[trustme.CA], trustme.LeafCert | ssl.SSLContext]) -> Server:
    """A server whose certificate is `make(our authority)`."""

    @contextlib.asynccontextmanager
    async def made(over: str, authority: trustme.CA) -> AsyncIterator[tuple[str, int]]:
        leaf = make(authority)
        tls = leaf if isinstance(leaf, ssl.SSLContext) else _context(leaf, "h2" if over == "h2" else "http/1.1")
        async with RawServer(never, tls=tls) as server:
            yield "localhost", server.port

    return made


@contextlib.asynccontextmanager
async def nobody(over: str, authority: trustme.CA) -> AsyncIterator[tuple[str, int]]:
    yield "127.0.0.1", closed_port()


@contextlib.asynccontextmanager
async def unknown_name(over: str, authority: trustme.CA) -> AsyncIterator[tuple[str, int]]:
    yield "no-such-host.invalid", 80 if over == "http" else 443


@contextlib.asynccontextmanager
async def black_hole(over: str, authority: trustme.CA) -> AsyncIterator[tuple[str, int]]:
    """A port that never answers a connect: its queue is full."""
    with full_backlog() as port:
        yield "127.0.0.1", port


async def bad_request(talk: Talk) -> None:
    await talk.some()
    await talk.say(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def speaks_plainly(script: Script) -> Server:
    """A server without TLS, whatever it is reached over."""

    @contextlib.asynccontextmanager
    async def made(over: str, authority: trustme.CA) -> AsyncIterator[tuple[str, int]]:
        async with RawServer(script) as server:
            yield "localhost", server.port

    return made


def refusing_proxy(status: bytes) -> Server:
    """The proxy behind ours, which opens no tunnel: what is asked for is itself, so that its port says both."""
    return speaks_plainly(says(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"))


def expired(authority: trustme.CA) -> trustme.LeafCert:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return authority.issue_cert("localhost", not_before=past - datetime.timedelta(days=1), not_after=past)


def wrong_host(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("example.org")


def unknown_authority(authority: trustme.CA) -> trustme.LeafCert:
    return trustme.CA().issue_cert("localhost")


def self_signed(authority: trustme.CA) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with trustme.Blob(pem).tempfile() as path:
        context.load_cert_chain(path)
    return context


def _context(leaf: trustme.LeafCert, alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    context.set_alpn_protocols([alpn])
    return context


# --- what servers say over HTTP/1 ----------------------------------------------------------------------------------


def says(*pieces: bytes, then: str = "close") -> Script:
    """Reads a head, says the pieces, and closes, resets or waits."""

    async def speak(talk: Talk) -> None:
        await talk.head()
        await talk.say(*pieces)
        if then == "reset":
            await reset(talk.writer)
        elif then == "wait":
            await never(talk)

    return speak


async def never(talk: Talk) -> None:
    """Says nothing until the other side goes."""
    await talk.rest()


async def reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection by RST, once the peer's kernel has what was written before."""
    raw = writer.get_extra_info("socket")
    await writer.drain()
    while struct.unpack("i", fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:
        await asyncio.sleep(0.001)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# --- what servers say over HTTP/2 ----------------------------------------------------------------------------------

type H2Act = Callable[[h2.connection.H2Connection, int, Talk], Awaitable[None]]


def h2_says(act: H2Act) -> Script:
    """Speaks HTTP/2 until a request has come, then acts."""

    async def speak(talk: Talk) -> None:
        conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        conn.initiate_connection()
        talk.writer.write(conn.data_to_send())
        while True:
            for event in conn.receive_data(await talk.some()):
                if isinstance(event, h2.events.StreamEnded):
                    await act(conn, event.stream_id, talk)
                    await talk.say(conn.data_to_send())
                    await never(talk)
            talk.writer.write(conn.data_to_send())

    return speak


async def h2_part(conn: h2.connection.H2Connection, stream: int, talk: Talk, length: int | None = 1000) -> None:
    """The head and a part of the body."""
    headers = [(":status", "200")] + ([("content-length", str(length))] if length is not None else [])
    conn.send_headers(stream, headers)
    conn.send_data(stream, SEEN)
    await talk.say(conn.data_to_send())


async def h2_resets_stream(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    conn.reset_stream(stream, 2)


async def h2_cancels_stream(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    conn.reset_stream(stream, 8)


async def h2_resets_stream_in_body(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    await h2_part(conn, stream, talk)
    conn.reset_stream(stream, 2)


async def h2_goes_away(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    conn.close_connection(11)


async def h2_bad_frame(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    await talk.say(b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x")  # DATA on stream 0


async def h2_resets_connection(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    await reset(talk.writer)


async def h2_resets_connection_in_body(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    await h2_part(conn, stream, talk)
    await reset(talk.writer)


async def h2_waits_in_body(conn: h2.connection.H2Connection, stream: int, talk: Talk) -> None:
    await h2_part(conn, stream, talk)
    await never(talk)


# --- clients -------------------------------------------------------------------------------------------------------


def curling(*arguments: str, most: float = 25) -> Client:
    """What curl makes of the answer."""

    async def go(place: Place) -> str:
        version = "--http2" if place.over == "h2" else "--http1.1"
        command = ["curl", "-sS", "-m", str(most), "-x", place.proxy.url, "--cacert", str(place.proxy.ca), version]
        command += [*arguments, "-o", "-", "-w", "%{stderr}\n%{http_code} %{http_connect}", place.url]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment()
        )
        _, err = await process.communicate()
        status, connect = (int(code) for code in err.decode().split("\n")[-1].split())
        if status == 0:
            return "closed" if connect in (0, 200) else f"{connect} to CONNECT"
        return f"{status}, cut" if process.returncode else str(status)

    return go


@dataclass
class Over:
    """A client that does another thing over HTTP/2."""

    h1: Client
    h2: Client

    async def __call__(self, place: Place) -> str:
        return await (self.h2 if place.over == "h2" else self.h1)(place)


async def distrusting(place: Place) -> str:
    """curl that trusts somebody else, and neither us nor the server."""
    with trustme.CA().cert_pem.tempfile() as path:
        return await curling("--cacert", path, "--capath", "/dev/null")(place)


@contextlib.asynccontextmanager
async def dialled(
    place: Place, alpn: str = "http/1.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the proxy; over HTTPS inside TLS with us, as after CONNECT."""
    reader, writer = await asyncio.open_connection("127.0.0.1", place.proxy.port)
    try:
        async with asyncio.timeout(DEADLINE):
            if place.over != "http":
                writer.write(b"CONNECT %b:%d HTTP/1.1\r\n\r\n" % (place.host.encode(), place.port))
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
                trusting = ssl.create_default_context(cafile=str(place.proxy.ca))
                trusting.set_alpn_protocols([alpn])
                await writer.start_tls(trusting, server_hostname=place.host)
            yield reader, writer
    finally:
        writer.close()


def sending(*pieces: bytes, until: bytes = b"", then: str = "read") -> Client:
    """Sends pieces (`%s` in them is the request target), reads to `until`, and reads on, closes or resets."""

    async def go(place: Place) -> str:
        target = place.url.encode() if place.over == "http" else b"/broken"
        async with dialled(place) as (reader, writer):
            for piece in pieces:
                writer.write(piece.replace(b"%s", target))
                await writer.drain()
            got = b""
            with contextlib.suppress(ConnectionError):
                got = await reader.readuntil(until) if until else b""
                if then == "reset":
                    await reset(writer)
                elif then == "read":
                    got += await reader.read(-1)
            return _status(got) if then == "read" else "gone"

    return go


def _status(got: bytes) -> str:
    return got.split(b" ", 2)[1].decode() if got.startswith(b"HTTP/") else "closed"


def h2_sending(
    act: Callable[[h2.connection.H2Connection, asyncio.StreamWriter], Any], *, request: bool = True
) -> Client:
    """An HTTP/2 client that opens a POST, sends a part of its body, and acts."""

    async def go(place: Place) -> str:
        async with dialled(place, "h2") as (reader, writer):
            conn = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
            conn.initiate_connection()
            if request:
                authority = f"{place.host}:{place.port}"
                pseudo = {":method": "POST", ":scheme": "https", ":authority": authority, ":path": "/broken"}
                conn.send_headers(1, [*pseudo.items(), ("content-length", "1000")])
                conn.send_data(1, SEEN)
            writer.write(conn.data_to_send())
            while not any(
                isinstance(event, h2.events.SettingsAcknowledged)
                for event in conn.receive_data(await reader.read(65536))
            ):
                pass  # until then our frames may be read with what comes now, and lost with it
            act(conn, writer)
            writer.write(conn.data_to_send())
            with contextlib.suppress(ConnectionError):
                await reader.read(-1)
        return "closed"

    return go


def h2_client_bad_frame(conn: h2.connection.H2Connection, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x")


def h2_client_resets(conn: h2.connection.H2Connection, writer: asyncio.StreamWriter) -> None:
    conn.reset_stream(1, 8)
    conn.close_connection()


def h2_client_goes_away(conn: h2.connection.H2Connection, writer: asyncio.StreamWriter) -> None:
    conn.close_connection()


def h2_within_head(then: str) -> Client:
    """An HTTP/2 client that sends a part of a request's head, and closes, resets or waits."""

    async def go(place: Place) -> str:
        async with dialled(place, "h2") as (reader, writer):
            conn = h2.connection.H2Connection()
            conn.initiate_connection()
            writer.write(conn.data_to_send() + HeadersFrame(1, data=b"\x82\x87").serialize())  # no END_HEADERS
            while not any(
                isinstance(event, h2.events.SettingsAcknowledged)
                for event in conn.receive_data(await reader.read(65536))
            ):
                pass  # it says that what we sent is read
            with contextlib.suppress(ConnectionError):
                if then == "reset":
                    await reset(writer)
                elif then == "wait":
                    await reader.read(-1)
        return "closed" if then == "wait" else "gone"

    return go


def in_tunnel(data: bytes, *, then: str = "close") -> Client:
    """Opens a tunnel, sends bytes where TLS should begin, and closes, or waits for the proxy to."""

    async def go(place: Place) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.proxy.port)
        async with asyncio.timeout(DEADLINE):
            writer.write(b"CONNECT %b:%d HTTP/1.1\r\n\r\n" % (place.host.encode(), place.port))
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(data)
            if then == "close":
                writer.write_eof()
            await reader.read(-1)
            writer.close()
        return "closed"

    return go


def hello(name: str) -> bytes:
    """A client hello for a server of that name."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    talk = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        talk.do_handshake()
    return outgoing.read()
