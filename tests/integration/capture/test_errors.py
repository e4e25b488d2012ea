"""Each failure leaves exactly one terminal event of the right type, and the client gets a clear answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme

from megido_shared.events import ErrorRaised, ErrorType, FlowCompleted, FlowFailed
from tests.integration.capture.breakage import Place, dialled
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import Proxy, body, capture, curl, flows, run, until
from tests.integration.capture.upstream import PIECE, Upstream, closed_port, full_backlog, serving


def ended(found: list[Any]) -> list[Any]:
    return [event for event in found if event.seq]


@contextlib.asynccontextmanager
async def untrusted(authority: trustme.CA) -> AsyncIterator[Upstream]:
    async with serving(server_context(trustme.CA(), "localhost")) as found:
        yield found


@contextlib.asynccontextmanager
async def other_name(authority: trustme.CA) -> AsyncIterator[Upstream]:
    async with serving(server_context(authority, "example.org")) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "error_type", "status"),
    [
        ("resethead", ErrorType.CONNECTION_RESET, 502),
        ("resetbody", ErrorType.CONNECTION_RESET, 200),
        ("garbage", ErrorType.PROTOCOL_ERROR, 502),
    ],
)
async def test_upstream_breaks(proxy: Proxy, upstream: Upstream, path: str, error_type: ErrorType, status: int) -> None:
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/{path}")
    assert answer.status == status
    found = await proxy.until(lambda events: bool(ended(events)))
    [failed] = ended(found)
    assert isinstance(failed, FlowFailed) and failed.failure.error_type is error_type
    assert failed.request.target == f"/{path}".encode()
    if path == "resetbody":
        assert answer.code != 0 and body(found, failed) == PIECE


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_refused(proxy: Proxy, scheme: str) -> None:
    port = closed_port()
    answer = await curl(proxy, f"{scheme}://127.0.0.1:{port}/")
    assert answer.status == 502
    found = await proxy.until(lambda events: bool(ended(events)))
    [event] = ended(found)
    assert event.failure.error_type is ErrorType.CONNECTION_RESET
    assert "Connect call failed" in event.failure.message and "Traceback" in event.failure.stack_trace
    if scheme == "https":
        assert isinstance(event, ErrorRaised) and event.url == f"https://127.0.0.1:{port}/"
    else:
        assert isinstance(event, FlowFailed)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_name_does_not_resolve(proxy: Proxy, scheme: str) -> None:
    assert (await curl(proxy, f"{scheme}://no-such-host.invalid/")).status == 502
    [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type is ErrorType.DNS_ERROR


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_connect_timeout(proxy: Proxy, scheme: str) -> None:
    with full_backlog() as port:
        assert (await curl(proxy, f"{scheme}://127.0.0.1:{port}/")).status == 502
        [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type is ErrorType.TIMEOUT and "connection_timeout" in event.failure.message


async def test_tls_handshake_that_never_ends(proxy: Proxy, upstream: Upstream) -> None:
    upstream.release.clear()
    answer = await curl(proxy, f"https://127.0.0.1:{upstream.port}/")  # it waits for the end of an HTTP head
    assert answer.status == 502
    [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type is ErrorType.TIMEOUT and "TLS handshake" in event.failure.message


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A server that sends `answer` to whoever has said something, and closes; at once when there is none."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer:
            await reader.read(1)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_upstream_closes_before_the_tls_handshake(proxy: Proxy) -> None:
    async with answering(b"") as port:
        assert (await curl(proxy, f"https://127.0.0.1:{port}/")).status == 502
    [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type in (ErrorType.CONNECTION_RESET, ErrorType.SSL_ERROR)


@pytest.mark.parametrize("server", [untrusted, other_name])
async def test_upstream_certificate_is_wrong(proxy: Proxy, authority: trustme.CA, server: Callable[..., Any]) -> None:
    async with server(authority) as upstream:
        answer = await curl(proxy, f"https://localhost:{upstream.port}/plain")
    assert answer.status == 502
    [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type is ErrorType.SSL_ERROR and "ertificate" in event.failure.message


async def test_upstream_speaks_no_tls(proxy: Proxy) -> None:
    async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert (await curl(proxy, f"https://127.0.0.1:{port}/plain")).status == 502
    [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type is ErrorType.SSL_ERROR


async def test_client_that_does_not_trust_us(proxy: Proxy, upstream_tls: Upstream, trusted: str) -> None:
    answer = await curl(proxy, f"https://localhost:{upstream_tls.port}/plain", "--cacert", trusted)
    assert answer.code == 60
    [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert isinstance(event, ErrorRaised) and event.failure.error_type is ErrorType.SSL_ERROR
    assert event.url == f"https://localhost:{upstream_tls.port}/" and event.client.ip == "127.0.0.1"


async def test_client_goes_away(proxy: Proxy, upstream: Upstream) -> None:
    upstream.release.clear()
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/hang", "-m", "0.3")
    assert answer.code == 28
    found = await proxy.until(lambda events: bool(ended(events)))
    [event] = ended(found)
    assert isinstance(event, FlowFailed) and event.failure.error_type is ErrorType.CONNECTION_RESET


async def test_an_answer_before_the_whole_upload_leaves_it_marked_as_cut(proxy: Proxy) -> None:
    async with answering(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        head = f"POST http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n"
        writer.write(head.encode() + PIECE)
        assert b" 413 " in await reader.readline()
        writer.close()
        [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert isinstance(event, FlowCompleted) and event.request.body.truncated


async def test_silent_upstream_with_transfer_timeout(tmp_path: Path, upstream: Upstream) -> None:
    upstream.release.clear()
    async with capture(tmp_path / "data", "--transfer-timeout", "1") as proxy:
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/hang")).status == 502
        [event] = ended(await proxy.until(lambda events: bool(ended(events))))
    assert event.failure.error_type is ErrorType.TIMEOUT and "transfer_timeout" in event.failure.message


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("alpn", "sent", "begun"),
    [
        ("http/1.1", b"", False),
        ("http/1.1", b"GET / HTTP/1.1\r\nHo", True),
        ("h2", b"", False),
        ("h2", PREFACE, False),
        ("h2", PREFACE + b"\0\0\x10\1", True),
    ],
)
async def test_a_client_inside_tls_has_header_timeout_for_its_first_head(
    tmp_path: Path, authority: trustme.CA, trusted: str, alpn: str, sent: bytes, begun: bool
) -> None:
    """A head that was begun is an error; a connection that was made ahead and never used is none."""
    options = ["--header-timeout", "1", "--set", f"ssl_verify_upstream_trusted_ca={trusted}"]
    async with (
        serving(server_context(authority, "localhost", alpn=(alpn,))) as upstream,
        capture(tmp_path / "data", *options) as proxy,
        dialled(Place(proxy, "https", upstream.port, authority), alpn) as (reader, writer),
    ):
        writer.write(sent)
        await reader.read(-1)  # until we close, or the helper gives up
        await until(partial(_ended, proxy), bool)
        told = [event for event in await proxy.events() if event.seq]
        assert [type(event) for event in told] == [ErrorRaised] * begun
        assert all(event.failure.error_type is ErrorType.TIMEOUT for event in told)


async def _ended(proxy: Proxy) -> bool:
    """Whether a client was cut for its head, once, and none is connected any more. Nothing fails at that."""
    found = (await run("curl", "-sS", f"http://127.0.0.1:{proxy.metrics_port}/metrics"))[1]
    assert "hook_errors" not in found
    return 'events_total{name="header_timeouts"} 1.0' in found and "megido_capture_client_connections 0.0" in found


@contextlib.asynccontextmanager
async def slowly(size: int, pieces: int) -> AsyncIterator[int]:
    """A server that takes its time for a body, but never long between two pieces of it."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size * pieces))
        for _ in range(pieces):
            await asyncio.sleep(0.3)
            writer.write(bytes(size))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.mark.parametrize("size", [1_000, 100_000])
async def test_a_slow_body_is_not_cut_by_transfer_timeout(tmp_path: Path, size: int) -> None:
    """Neither one that is read whole nor one that streams, far above the cap."""
    async with (
        slowly(size, 7) as port,
        capture(tmp_path / "data", "--transfer-timeout", "1", "--max-body-size", "10") as proxy,
    ):
        answer = await curl(proxy, f"http://127.0.0.1:{port}/")
        found = await proxy.events()
    assert (answer.code, len(answer.body)) == (0, 7 * size)
    assert [type(event) for event in ended(found)] == [FlowCompleted]


async def test_own_api_is_not_reachable_through_the_proxy(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(tmp_path / "data", "--api-url", f"http://localhost:{upstream.port}") as proxy:
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "127.0.0.2", "127.1", "2130706433"):
            assert (await curl(proxy, f"http://{host}:{upstream.port}/plain")).status == 502
        found = await proxy.until(lambda events: len(flows(events, FlowFailed)) == 7)
    assert [head for head in upstream.seen if b"/plain" in head] == []
    assert all("own API" in event.failure.message for event in flows(found, FlowFailed))


async def test_interrupted_connect_is_one_event(proxy: Proxy) -> None:
    """A client that leaves while we still connect for it."""
    with full_backlog() as port:
        await curl(proxy, f"https://127.0.0.1:{port}/", "-m", "0.3")
        found = await proxy.until(lambda events: bool(ended(events)))
    assert [type(event) for event in ended(found)] == [ErrorRaised]
