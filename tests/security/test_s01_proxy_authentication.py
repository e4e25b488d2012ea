"""Line 1: credentials on CONNECT and on plain requests, in every form; nobody but the proxy ever sees them."""

import asyncio
import base64
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from megido_shared.events import AuthAttempted, FlowCompleted, unpack_headers
from tests.integration.capture.harness import Answer, Proxy, capture, curl, flows, start
from tests.integration.capture.upstream import Upstream
from tests.support.inside import inside
from tests.support.raw_server import OK, RawServer, Talk

pytestmark = pytest.mark.timeout(120)

_numbers = itertools.count(1)

TOKEN = "t0ken:with:cölons"
PASSWORD = "pässword:1"


def basic(username: str, password: str, encoding: str = "utf-8") -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode(encoding)).decode()


@pytest.fixture(scope="module")
def guarded_process(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[Proxy]:
    options = ("auth_username=änna", f"auth_password={PASSWORD}", f"ssl_verify_upstream_trusted_ca={trusted}")
    arguments = [part for option in options for part in ("--set", option)]
    proxy = start(tmp_path_factory.mktemp("guarded"), "--auth-required", *arguments, PROXY_AUTH_TOKEN=TOKEN)
    yield proxy
    assert proxy.stop() == 0


@pytest.fixture
def guarded(guarded_process: Proxy) -> Proxy:
    return guarded_process.from_now()


def nobody_else() -> tuple[str, int]:
    """An address that asks for the first time: what others were refused is no flood of it."""
    number = next(_numbers)
    return f"127.1.{number >> 8}.{number & 255}", 0


async def asked(proxy: Proxy, url: str, *arguments: str) -> Answer:
    return await curl(proxy, url, "--interface", nobody_else()[0], *arguments)


def sent(header: str, tls: bool) -> tuple[str, str]:
    return ("--proxy-header" if tls else "-H", f"Proxy-Authorization: {header}")


def url(upstream: Upstream, upstream_tls: Upstream, tls: bool, path: str = "echo") -> str:
    return f"https://localhost:{upstream_tls.port}/{path}" if tls else f"http://127.0.0.1:{upstream.port}/{path}"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("header", "username"),
    [
        (f"Bearer {TOKEN}", ""),
        (basic("whoever", TOKEN), "whoever"),
        (basic("", TOKEN), ""),
        (basic("änna", PASSWORD), "änna"),
    ],
)
async def test_accepted(
    guarded: Proxy, upstream: Upstream, upstream_tls: Upstream, header: str, username: str, tls: bool
) -> None:
    answer = await curl(guarded, url(upstream, upstream_tls, tls), *sent(header, tls), "--http1.1")
    assert answer.status == 200 and b"proxy-authorization" not in answer.body.lower()
    found = await guarded.events()
    [attempt], [flow] = flows(found, AuthAttempted), flows(found)
    assert attempt.success and attempt.username == username and attempt.client.ip == "127.0.0.1"
    assert b"proxy-authorization" not in {name.lower() for name, _ in unpack_headers(flow.request.headers)}


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "no credentials"),
        ("", "no credentials"),
        ("Bearer", "no token"),
        ("Bearer wrong", "wrong token"),
        (f"Bearer {PASSWORD}", "wrong token"),
        (f"Token {TOKEN}", "unsupported scheme"),
        (f"Digest username={TOKEN}", "unsupported scheme"),
        (basic("änna", "wrong"), "wrong password"),
        (basic("anna", PASSWORD), "wrong password"),
        (basic("", PASSWORD), "wrong password"),
        (basic(TOKEN, ""), "wrong password"),
        (basic("änna", PASSWORD, "latin-1"), "wrong password"),
        ("Basic " + base64.b64encode(TOKEN.encode()).decode().replace("=", "="), "wrong password"),
        ("Basic " + base64.b64encode(b"without").decode(), "no password"),
        ("Basic %%%", "malformed"),
        ("Basic ÄÄÄ=", "malformed"),
        ("Basic =", "malformed"),
        (f"Bearer {TOKEN}, Bearer {TOKEN}", "wrong token"),
        ("Bearer " + "x" * 9_000, "too long"),
        ("Basic " + "eHg6" * 30_000, "too long"),
    ],
)
async def test_refused(
    guarded: Proxy, upstream: Upstream, upstream_tls: Upstream, header: str | None, reason: str, tls: bool
) -> None:
    given = () if header is None else sent(header, tls)
    shown = ("--suppress-connect-headers", "-D", "-") if not tls else ("-v",)
    answer = await asked(guarded, url(upstream, upstream_tls, tls), *given, *shown)
    assert answer.status == 407
    if not tls:
        assert answer.body.lower().count(b"proxy-authenticate:") == 2
    assert upstream.seen == [] and upstream_tls.seen == []
    [attempt] = await guarded.events()
    assert isinstance(attempt, AuthAttempted) and not attempt.success and reason in attempt.failure_reason


async def test_a_refused_connect_is_challenged(guarded: Proxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded.port, local_addr=nobody_else())
    writer.write(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert b" 407 " in head and b"proxy-authenticate: basic realm" in head and b"proxy-authenticate: bearer" in head
    writer.close()


async def test_a_connection_is_told_once_and_still_refuses_what_is_wrong(guarded: Proxy, upstream: Upstream) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded.port, local_addr=nobody_else())

    async def ask(*fields: str) -> bytes:
        lines = [f"GET http://127.0.0.1:{upstream.port}/plain/1 HTTP/1.1", "Host: x", *fields]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
        await reader.readexactly(length)
        return head.split(b" ")[1]

    good = f"Proxy-Authorization: Bearer {TOKEN}"
    assert [await ask(*fields) for fields in ((good,), (), (good,))] == [b"200"] * 3
    assert await ask("Proxy-Authorization: Bearer other") == b"407"  # a user behind a proxy that shares connections
    assert await ask() == b"200"
    writer.close()
    found = flows(await guarded.events(), AuthAttempted)
    assert [attempt.success for attempt in found] == [True, False]


UPLOADS = (
    ("-H", "Content-Type: x"),
    ("-H", "Transfer-Encoding: chunked"),
    ("-H", "Expect: 100-continue"),
    ("-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked"),
)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("how", UPLOADS)
async def test_a_refused_upload_ends_at_once(
    guarded: Proxy, upstream: Upstream, upstream_tls: Upstream, tmp_path: Path, how: tuple[str, ...], tls: bool
) -> None:
    (tmp_path / "upload").write_bytes(b"x" * 3_000_000)
    target = url(upstream, upstream_tls, tls, "count")
    answer = await asked(guarded, target, *how, "--data-binary", f"@{tmp_path / 'upload'}", "-m", "20")
    assert answer.code != 28 and answer.status in (0, 407)  # 28: it waited for ever
    assert upstream.seen == [] and upstream_tls.seen == []
    assert [attempt.success for attempt in flows(await guarded.events(), AuthAttempted)] == [False]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("how", UPLOADS[:2])
async def test_an_upload_inside_a_tunnel(
    guarded: Proxy, upstream_tls: Upstream, tmp_path: Path, version: str, how: tuple[str, ...]
) -> None:
    (tmp_path / "upload").write_bytes(b"x" * 3_000_000)
    file = ("--data-binary", f"@{tmp_path / 'upload'}")
    target = f"https://localhost:{upstream_tls.port}/count"
    answer = await asked(guarded, target, version, *how, *file, *sent(f"Bearer {TOKEN}", True))
    assert (answer.status, answer.body) == (200, b"3000000")
    refused = await asked(guarded, target, version, *how, *file, *sent("Bearer wrong", True))
    assert refused.status == 407 and refused.code != 28


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_not_forwarded_inside_a_tunnel(guarded: Proxy, upstream_tls: Upstream, version: str) -> None:
    inside = ("-H", "Proxy-Authorization: Basic c2VjcmV0OmNhbmFyeQ==")
    target = f"https://localhost:{upstream_tls.port}/echo"
    answer = await asked(guarded, target, version, *inside, *sent(f"Bearer {TOKEN}", True))
    assert answer.status == 200 and b"c2VjcmV0" not in answer.body
    [flow] = flows(await guarded.events(), FlowCompleted)
    assert b"proxy-authorization" not in {name.lower() for name, _ in unpack_headers(flow.request.headers)}
    _nowhere(guarded.data_dir, b"c2VjcmV0OmNhbmFyeQ==")


@pytest.mark.parametrize("tls", [False, True])
async def test_an_upstream_proxy_gets_its_own_credentials_and_no_others(tmp_path: Path, tls: bool) -> None:
    async def answering(talk: Talk) -> None:
        while True:
            await talk.head()
            await talk.say(OK)

    async with RawServer(answering) as chained:
        arguments = ("--mode", f"upstream:http://127.0.0.1:{chained.port}", "--set", "upstream_auth=chain:link")
        async with capture(tmp_path, *arguments, "--auth-required", PROXY_AUTH_TOKEN=TOKEN) as proxy:
            target = "https://origin.example/" if tls else "http://origin.example/"
            await curl(proxy, target, *sent(f"Bearer {TOKEN}", tls))
            head = chained.received[0].lower()
            assert head.count(b"proxy-authorization") == 1
            assert base64.b64encode(b"chain:link").lower() in head
            assert (await curl(proxy, target, *sent("Bearer wrong", tls))).status == 407
            assert len(chained.received) == 1
        _nowhere(tmp_path, TOKEN.encode())


@pytest.mark.parametrize("mode", ["reverse", "socks5"])
async def test_modes_without_credentials_forward_none(tmp_path: Path, upstream: Upstream, mode: str) -> None:
    named = f"reverse:http://127.0.0.1:{upstream.port}" if mode == "reverse" else mode
    async with capture(tmp_path, "--mode", named) as proxy:
        header = ("-H", f"Proxy-Authorization: Bearer {TOKEN}")
        way = ("-x", "") if mode == "reverse" else ("-x", f"socks5h://127.0.0.1:{proxy.port}")
        port = proxy.port if mode == "reverse" else upstream.port
        answer = await curl(proxy, f"http://127.0.0.1:{port}/echo", *way, *header)
        assert answer.status == 200 and b"proxy-authorization" not in answer.body.lower()
    _nowhere(tmp_path, TOKEN.encode())


async def test_a_secret_is_nowhere(guarded: Proxy, upstream: Upstream) -> None:
    given = [f"Bearer {TOKEN}", basic("änna", PASSWORD), basic("x", "canary-guess"), "Bearer canary-guess"]
    # In the wrong place: without a scheme, as user name with and without a password, in front of no colon.
    given += [TOKEN, "canary-guess", f"{TOKEN} x", basic(TOKEN, ""), basic(PASSWORD, "x"), basic("canary-guess", "")]
    given += ["Basic " + base64.b64encode(secret.encode()).decode() for secret in (TOKEN, "canary-guess")]
    for header in given:
        await asked(guarded, f"http://127.0.0.1:{upstream.port}/plain", *sent(header, False))
    shown = {attempt.username for attempt in flows(await guarded.events(), AuthAttempted)}
    assert shown == {"", "änna", "x"}
    for secret in (TOKEN, PASSWORD, "canary-guess"):
        _nowhere(guarded.data_dir, secret.encode())
        assert not [line for line in guarded.output if secret in line]


def _nowhere(folder: Path, secret: bytes) -> None:
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert secret not in content and base64.b64encode(secret) not in content, path


async def test_what_is_open_ends_when_its_credentials_are_accepted_no_more(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    async with inside(tmp_path, auth_required=True, auth_token="first", auth_password="kept") as proxy:
        plain = await _asking(proxy, f"GET http://127.0.0.1:{upstream.port}/plain/1 HTTP/1.1", "Bearer first")
        tunnel = await _asking(proxy, f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1", "Bearer first")
        waiting = await _asking(
            proxy, f"GET http://127.0.0.1:{upstream.port}/hang HTTP/1.1", "Bearer first", read=False
        )
        other = await _asking(proxy, f"GET http://127.0.0.1:{upstream.port}/plain/1 HTTP/1.1", basic("x", "kept"))
        proxy.apply(auth_token="second")
        for reader, _ in (plain, tunnel, waiting):
            assert await _ended(reader)
        reader, writer = other
        writer.write(f"GET http://127.0.0.1:{upstream.port}/plain/2 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        again = await _asking(
            proxy, f"GET http://127.0.0.1:{upstream.port}/plain/1 HTTP/1.1", "Bearer first", read=False
        )
        assert b" 407 " in await again[0].readuntil(b"\r\n\r\n")
        told = flows(await proxy.events(), AuthAttempted)
        assert sum("accepted no more" in attempt.failure_reason for attempt in told) == 3
    upstream.release.set()


async def test_asking_for_credentials_from_now_on_ends_what_has_shown_none(tmp_path: Path, upstream: Upstream) -> None:
    async with inside(tmp_path) as proxy:
        tunnel = await _asking(proxy, f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1", "")
        proxy.apply(auth_required=True, auth_token="now")
        assert await _ended(tunnel[0])
        again = await _asking(proxy, f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1", "", read=False)
        assert b" 407 " in await again[0].readuntil(b"\r\n\r\n")
        await _asking(proxy, f"CONNECT 127.0.0.1:{upstream.port} HTTP/1.1", "Bearer now")


type Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _asking(proxy: Proxy, line: str, header: str, *, read: bool = True) -> Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(f"{line}\r\nHost: x\r\nProxy-Authorization: {header}\r\n\r\n".encode())
    if read:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        assert b" 200 " in head
        if line.startswith("GET"):
            await reader.readuntil(b"}")
    return reader, writer


async def _ended(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 20) == b""
    return True
