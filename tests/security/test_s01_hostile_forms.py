"""Line 1: credentials in forms and places that no browser uses, and bodies where none belongs."""

import asyncio
import base64
import random
from pathlib import Path

import argon2
import pytest
import trustme

from megido_capture.access.credentials import Accepted, parse
from megido_capture.configuration.settings import CaptureSettings
from megido_shared.events import AuthAttempted, FlowCompleted, unpack_headers
from tests.integration.capture import h2peer
from tests.integration.capture.conftest import server_context
from tests.integration.capture.h2peer import H2Peer
from tests.integration.capture.harness import Proxy, curl, flows
from tests.integration.capture.upstream import Upstream
from tests.security.test_s01_proxy_authentication import basic
from tests.support.inside import Inside, inside

pytestmark = pytest.mark.timeout(120)

TOKEN = "t0ken"
RIGHT = f"Proxy-Authorization: Bearer {TOKEN}"
WRONG = "Proxy-Authorization: Bearer wrong"
CLOSE = "Connection: close"


async def everything(proxy: Inside, *lines: str, body: str = "") -> bytes:
    """Whatever the proxy answers until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write("\r\n".join([*lines, "", body]).encode())
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.mark.parametrize(
    "fields",
    [
        (RIGHT, WRONG),
        (WRONG, RIGHT),
        (RIGHT, RIGHT),
        (f"Proxy-Authorization: Bearer {TOKEN}, Bearer {TOKEN}",),
        (f"Proxy-Authorization:\tBearer\t{TOKEN}",),
        (f"Proxy-Authorization: Bearer\u00a0{TOKEN}",),
        (f"Proxy-Authorization: Bearer {TOKEN}\u00a0",),
        (f"Proxy_Authorization: Bearer {TOKEN}",),
        (f"Authorization: Bearer {TOKEN}",),
    ],
)
@pytest.mark.parametrize("line", ["GET http://127.0.0.1:{port}/echo HTTP/1.1", "CONNECT 127.0.0.1:{port} HTTP/1.1"])
async def test_ambiguous_credentials_are_none(
    tmp_path: Path, upstream: Upstream, line: str, fields: tuple[str, ...]
) -> None:
    async with inside(tmp_path, auth_required=True, auth_token=TOKEN) as proxy:
        answer = await everything(proxy, line.format(port=upstream.port), "Host: x", *fields, CLOSE)
        assert answer.startswith(b"HTTP/1.1 407 ") and upstream.seen == []
        [attempt] = flows(await proxy.events(), AuthAttempted)
        assert not attempt.success and attempt.username == ""


@pytest.mark.parametrize("field", [f"Proxy-Authorization : Bearer {TOKEN}", f" Proxy-Authorization: Bearer {TOKEN}"])
async def test_a_malformed_field_is_no_request(tmp_path: Path, upstream: Upstream, field: str) -> None:
    async with inside(tmp_path, auth_required=True, auth_token=TOKEN) as proxy:
        answer = await everything(proxy, f"GET http://127.0.0.1:{upstream.port}/echo HTTP/1.1", "Host: x", field, CLOSE)
        assert answer.startswith(b"HTTP/1.1 400 ") and upstream.seen == []


@pytest.mark.parametrize("framing", ["Content-Length: {size}", "Transfer-Encoding: chunked"])
async def test_the_body_of_a_refused_connect_is_no_request(tmp_path: Path, upstream: Upstream, framing: str) -> None:
    """The right credentials in it are for nobody."""
    smuggled = f"GET http://127.0.0.1:{upstream.port}/plain HTTP/1.1\r\nHost: x\r\n{RIGHT}\r\n\r\n"
    own = f"GET http://127.0.0.1:{upstream.port}/plain HTTP/1.1\r\nHost: x\r\n{CLOSE}\r\n\r\n"
    body = smuggled if "size" in framing else f"{len(smuggled):x}\r\n{smuggled}\r\n0\r\n\r\n"
    async with inside(tmp_path, auth_required=True, auth_token=TOKEN) as proxy:
        line = f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1"
        answer = await everything(proxy, line, "Host: x", framing.format(size=len(body)), WRONG, body=body + own)
        assert answer.startswith(b"HTTP/1.1 407 ") and b" 200 " not in answer and upstream.seen == []
        assert not any(attempt.success for attempt in flows(await proxy.events(), AuthAttempted))


@pytest.mark.parametrize("how", [("-H", "Content-Type: x"), ("-H", "Transfer-Encoding: chunked"), ("-H", "Expect:")])
async def test_an_upload_waits_for_the_hash_of_its_credentials(
    tmp_path: Path, upstream: Upstream, how: tuple[str, ...]
) -> None:
    (tmp_path / "upload").write_bytes(b"x" * 3_000_000)
    body = ("--data-binary", f"@{tmp_path / 'upload'}", "-m", "20")
    url = f"http://127.0.0.1:{upstream.port}/count"
    async with inside(tmp_path / "data") as proxy:
        proxy.apply(auth_required=True, auth_token_hash=argon2.PasswordHasher().hash(TOKEN))
        refused = await curl(proxy, url, *how, *body, "-H", WRONG)
        assert refused.status in (0, 407) and refused.code != 28 and upstream.seen == []  # 28: it waited for ever
        answer = await curl(proxy, url, *how, *body, "-H", RIGHT)
        assert (answer.status, answer.body) == (200, b"3000000")
        assert [attempt.success for attempt in flows(await proxy.events(), AuthAttempted)] == [False, True]


async def test_trailers_carry_no_credentials(proxy: Proxy, authority: trustme.CA) -> None:
    peers = list[H2Peer]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(peer := H2Peer(reader, writer, client=False))
        await peer.until(lambda: 1 in peer.streams and peer.streams[1].ended)
        await peer.head(1, [(":status", "204")], end=True)
        await peer.task

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(authority, "127.0.0.1", alpn=("h2",)))
    port = server.sockets[0].getsockname()[1]
    client = await h2peer.connect(proxy, port)
    await client.head(1, h2peer.request(port, "/call", "POST", ("te", "trailers")))
    await client.data(1, b"body")
    await client.head(1, [("x-checksum", "1"), ("proxy-authorization", f"Bearer {TOKEN}")], end=True)
    await client.until(lambda: 1 in client.streams and client.streams[1].ended)
    assert peers[0].streams[1].trailers == [("x-checksum", "1")]
    [flow] = flows(await proxy.until(lambda found: bool(flows(found))), FlowCompleted)
    assert unpack_headers(flow.request.trailers) == [(b"x-checksum", b"1")]
    for peer in (client, *peers):
        await peer.close()
    server.close()


def test_no_header_breaks_the_parser_or_is_right_by_chance() -> None:
    rng = random.Random(5)
    accepted = Accepted(CaptureSettings(auth_token=TOKEN, auth_username="anna", auth_password="pässword"))
    pieces = ("Basic", "basic ", "Bearer", "BEARER ", " ", "\t", "=", ":", "\x00", "\udcff", "é", "\u2028", "YTpi", ",")
    for _ in range(20_000):
        header = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        given = parse(header)
        assert given.problem or not accepted.compare(given)
        given.shown.encode()  # what is recorded of it is text that can be written
        assert len(given.hidden) <= 17


@pytest.mark.parametrize(
    ("header", "right"),
    [
        (f"BEARER {TOKEN}", True),
        (f"  Bearer   {TOKEN}  ", True),
        (f"Bearer {TOKEN.upper()}", False),
        (f"Bearer {TOKEN}\x00", False),
        (f"Bearer {TOKEN}\u00a0", False),
        (f"Bearer {TOKEN}\x1c", False),
        (f"Bearer {TOKEN}\udcff", False),
        (basic("anna", "pässword"), True),
        (basic("anna", "pa\u0308ssword"), False),  # the same to the eye; RFC 7617 leaves it to the server
        (basic("anna", ""), False),
        (basic("", ""), False),
        (basic("anna\x00", "pässword"), False),
        (basic("anna", "pässword\x00"), False),
        (basic("anna", "pässword", "latin-1"), False),
        ("Basic " + base64.urlsafe_b64encode("anna:pässword".encode()).decode().rstrip("="), False),
        ("Basic " + base64.b64encode("anna:pässword".encode()).decode() + " x", False),
    ],
)
def test_one_spelling_is_right(header: str, right: bool) -> None:
    given = parse(header)
    accepted = Accepted(CaptureSettings(auth_token=TOKEN, auth_username="anna", auth_password="pässword"))
    assert (not given.problem and bool(accepted.compare(given))) is right
