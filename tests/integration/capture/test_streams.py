"""What passes piece by piece, and answers that are none of the usual kind: at the client, and in the journal."""

import asyncio
import gzip

import pytest
import trustme

from megido_shared.events import FlowStarted, unpack_headers
from tests.integration.capture import h2peer
from tests.integration.capture.conftest import server_context
from tests.integration.capture.h2peer import H2Peer
from tests.integration.capture.harness import Proxy, body, curl, flows
from tests.support.raw_server import RawServer, Script, Talk

EVENT = b"data: %d\n\n"
SECONDS = 30


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Connection: close"])
@pytest.mark.parametrize(
    "kind", [b"text/event-stream", b"text/event-stream; charset=utf-8", b"multipart/x-mixed-replace; boundary=b"]
)
async def test_each_piece_reaches_the_client_before_the_next_is_sent(proxy: Proxy, framing: bytes, kind: bytes) -> None:
    read = asyncio.Semaphore(0)

    async def script(talk: Talk) -> None:
        await talk.head()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n" % (kind, framing))
        for number in range(3):
            event = EVENT % number
            await talk.say(b"%x\r\n%s\r\n" % (len(event), event) if b"chunked" in framing else event)
            await read.acquire()
        if b"chunked" in framing:
            await talk.say(b"0\r\n\r\n")

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n" % server.port)
        for number in range(3):
            await asyncio.wait_for(reader.readuntil(EVENT % number), SECONDS)
            read.release()
        [flow] = flows(found := await proxy.until(lambda found: bool(flows(found))))
        assert body(found, flow) == b"".join(EVENT % number for number in range(3))
        writer.close()


async def test_compressed_events_pass_as_they_come(proxy: Proxy) -> None:
    read = asyncio.Semaphore(0)
    pieces = [gzip.compress(EVENT % number) for number in range(3)]

    async def script(talk: Talk) -> None:
        await talk.head()
        lines = b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nContent-Length: %d"
        await talk.say(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % (lines % sum(map(len, pieces))))
        for piece in pieces:
            await talk.say(piece)
            await read.acquire()

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n" % server.port)
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        for piece in pieces:
            assert await asyncio.wait_for(reader.readexactly(len(piece)), SECONDS) == piece
            read.release()
        [flow] = flows(found := await proxy.until(lambda found: bool(flows(found))))
        assert body(found, flow) == b"".join(pieces)
        writer.close()


@pytest.mark.parametrize("kind", ["text/event-stream", "application/grpc"])
async def test_http2_streams_both_ways_with_trailers(proxy: Proxy, authority: trustme.CA, kind: str) -> None:
    """Each message is answered before the next is sent, as in a bidirectional call of gRPC."""
    peers: list[H2Peer] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = H2Peer(reader, writer, client=False)
        peers.append(peer)
        await peer.until(lambda: 1 in peer.streams and peer.streams[1].headers)
        await peer.head(1, [(":status", "200"), ("content-type", kind)])
        for number in range(3):
            await peer.until(lambda: len(peer.streams[1].data) >= 5 * (number + 1))  # noqa: B023
            await peer.data(1, EVENT % number)
        await peer.until(lambda: peer.streams[1].ended)
        await peer.head(1, [("grpc-status", "0"), ("grpc-message", "fine")], end=True)
        await peer.task

    context = server_context(authority, "127.0.0.1", alpn=("h2",))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    client = await h2peer.connect(proxy, port)
    fields = h2peer.request(port, "/call", "POST", ("content-type", kind), ("te", "trailers"))
    await client.head(1, fields)
    whole = b""
    for number in range(3):
        await client.data(1, b"ask %d" % number)
        whole += EVENT % number
        await client.until(lambda: 1 in client.streams and bytes(client.streams[1].data) == whole)  # noqa: B023
    await client.head(1, [("x-checksum", "1")], end=True)
    await client.until(lambda: client.streams[1].ended)
    assert ("grpc-status", "0") in client.streams[1].trailers
    found = await proxy.until(lambda found: bool(flows(found)))
    [flow] = flows(found)
    assert body(found, flow) == whole and body(found, flow, "request") == b"ask 0ask 1ask 2"
    assert (b"grpc-status", b"0") in unpack_headers(flow.response.trailers)
    assert (b"x-checksum", b"1") in unpack_headers(flow.request.trailers)
    for peer in (client, *peers):
        await peer.close()
    server.close()


async def test_trailers_of_http1_are_dropped_and_the_body_passes(proxy: Proxy) -> None:
    """Each way; an intermediary may discard them (RFC 9110, 6.5.1)."""
    body_with_trailers = b"2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n"

    async def script(talk: Talk) -> None:
        await talk.head()
        await talk.until(b"0\r\n\r\n")
        await talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body_with_trailers)

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        head = b"POST http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head % server.port + body_with_trailers)
        answer = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), SECONDS)
        assert b"200 OK" in answer and b"2\r\nok\r\n" in answer
        writer.close()
    [flow] = flows(found := await proxy.until(lambda found: bool(flows(found))))
    assert (body(found, flow), body(found, flow, "request")) == (b"ok", b"ok")


def saying(answer: bytes) -> Script:
    async def script(talk: Talk) -> None:
        await talk.head()
        await talk.say(answer)

    return script


@pytest.mark.parametrize(
    ("answer", "arguments", "status"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", (), 204),
        (b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\nContent-Length: 5000000\r\n\r\n', (), 304),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n", ("-I",), 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ("-I",), 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", (), 200),
    ],
    ids=["204", "304", "head", "head-chunked", "empty"],
)
async def test_answers_without_a_body(proxy: Proxy, answer: bytes, arguments: tuple[str, ...], status: int) -> None:
    async with RawServer(saying(answer)) as server:
        got = await curl(proxy, f"http://127.0.0.1:{server.port}/", *arguments)
    assert (got.code, got.status) == (0, status)
    [flow] = flows(await proxy.until(lambda found: bool(flows(found))))
    assert (flow.response.status, flow.response.body.size, flow.response.body.truncated) == (status, 0, False)


@pytest.mark.parametrize("apart", [False, True])
async def test_interim_responses_do_not_hide_the_final_one(proxy: Proxy, apart: bool) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    answer = interim + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def script(talk: Talk) -> None:
        await talk.head()
        if not apart:
            await talk.say(answer)
        else:
            await talk.say(*(answer[at : at + 5] for at in range(0, len(answer), 5)))

    async with RawServer(script) as server:
        got = await curl(proxy, f"http://127.0.0.1:{server.port}/")
    assert (got.code, got.status, got.body) == (0, 200, b"ok")
    [flow] = flows(await proxy.until(lambda found: bool(flows(found))))
    assert (flow.response.status, flow.response.body.data) == (200, b"ok")


async def test_an_upgrade_to_http2_in_the_clear_is_not_offered(proxy: Proxy) -> None:
    async with RawServer(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as server:
        offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
        arguments = [part for line in offer for part in ("-H", line)]
        got = await curl(proxy, f"http://127.0.0.1:{server.port}/", *arguments)
        assert (got.status, got.body) == (200, b"ok")
        assert b"h2c" not in server.received[0].lower()
    assert len(flows(await proxy.until(lambda found: bool(flows(found))))) == 1


async def test_a_tunnel_that_speaks_something_else_passes(proxy: Proxy) -> None:
    async def script(talk: Talk) -> None:
        await talk.exactly(5)
        await talk.say(b"\x00pong\xff")

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % server.port)
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SECONDS)
        writer.write(b"\x00ping")
        assert await asyncio.wait_for(reader.readexactly(6), SECONDS) == b"\x00pong\xff"
        writer.close()
    assert not flows(await proxy.events()) and not flows(await proxy.events(), FlowStarted)
