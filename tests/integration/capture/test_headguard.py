"""Heads above 256 KB or 1,000 fields: refused while they arrive, recorded once, and nobody else notices."""

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trustme

from megido_capture.mitm.headguard import MAX_BYTES, MAX_FIELDS
from megido_shared.events import ErrorRaised, ErrorType, FlowCompleted, FlowFailed
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import Proxy, capture, curl, flows
from tests.integration.capture.upstream import Upstream
from tests.support.raw_server import OK, RawServer, Talk

pytestmark = pytest.mark.timeout(90)


async def answering(talk: Talk) -> None:
    while True:
        await talk.head()
        await talk.say(OK)


async def answering_h2(talk: Talk) -> None:
    """1,100 fields for `/many`, 900 otherwise; takes heads of any size."""
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    conn.decoder.max_header_list_size = 1 << 24
    conn.initiate_connection()
    await talk.say(conn.data_to_send())
    while True:
        for event in conn.receive_data(await talk.some()):
            if isinstance(event, h2.events.RequestReceived):
                many = (":path", "/many") in (event.headers or ())
                more = [(f"x-{number}", "1") for number in range(1_100 if many else 900)]
                conn.send_headers(event.stream_id or 0, [(":status", "200"), *more], end_stream=True)
        await talk.say(conn.data_to_send())


def head_of(port: int, *, fields: int, size: int = 0) -> bytes:
    """A request head of exactly that many fields and, if given, bytes."""
    lines = [b"GET http://127.0.0.1:%d/big HTTP/1.1" % port, b"Host: x"]
    lines += [b"a%d: 1" % number for number in range(fields - len(lines))]
    head = b"\r\n".join((*lines, b"Z: "))
    return head + b"z" * (size - len(head) - 4) + b"\r\n\r\n"


async def converse(proxy: Proxy, head: bytes, tls_to: str = "", alpn: str = "") -> tuple[bytes, bool]:
    """What the proxy answers until it closes or has said `ok`, and whether it closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1 << 20)
    try:
        if tls_to:
            writer.write(f"CONNECT {tls_to} HTTP/1.1\r\nHost: {tls_to}\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            context = ssl.create_default_context(cafile=str(proxy.ca))
            context.set_alpn_protocols(["http/1.1"])
            await writer.start_tls(context, server_hostname="localhost")
        writer.write(head)
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := await asyncio.wait_for(reader.read(65536), 20):
                found += piece
                if found.endswith(b"\r\n\r\nok"):
                    return found, False
        return found, True
    finally:
        writer.close()


def errors(found: list[Any]) -> list[Any]:
    return [event for event in found if isinstance(event, ErrorRaised)]


async def test_at_the_caps_a_head_passes(proxy: Proxy) -> None:
    async with RawServer(answering) as upstream:
        for head in (
            head_of(upstream.port, fields=MAX_FIELDS),
            head_of(upstream.port, fields=20, size=MAX_BYTES),
            head_of(upstream.port, fields=MAX_FIELDS, size=MAX_BYTES),
        ):
            answer, closed = await converse(proxy, head)
            assert answer.startswith(b"HTTP/1.1 200 ") and not closed
        # Only the request line was rewritten for the origin.
        assert upstream.received[0].partition(b"\r\n")[2] == head_of(0, fields=MAX_FIELDS).partition(b"\r\n")[2]
    found = await proxy.until(lambda events: len(flows(events)) == 3)
    assert errors(found) == []


@pytest.mark.parametrize("over", ["bytes", "fields"])
@pytest.mark.parametrize("tls", [False, True])
async def test_above_a_cap_431_and_closed(proxy: Proxy, upstream_tls: Upstream, over: str, tls: bool) -> None:
    head = head_of(1, fields=MAX_FIELDS + 1) if over == "fields" else head_of(1, fields=20, size=MAX_BYTES + 1)
    target = f"localhost:{upstream_tls.port}"
    answer, closed = await converse(proxy, head, tls_to=target if tls else "")
    assert answer.startswith(b"HTTP/1.1 431 ") and closed
    assert (b"1,000 fields" if over == "fields" else b"262,144 bytes") in answer
    found = await proxy.until(lambda events: bool(errors(events)))
    [event] = [event for event in found if event.seq]
    assert event.failure.error_type is ErrorType.PROTOCOL_ERROR and "request head" in event.failure.message
    assert event.client.ip == "127.0.0.1" and event.url == (f"https://{target}/" if tls else "")


async def test_curl_is_told(proxy: Proxy, upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "many").write_text("".join(f"X-{number}: 1\n" for number in range(10_000)))
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/", "-H", f"@{tmp_path / 'many'}")
    assert (answer.code, answer.status) == (0, 431) and b"1,000 fields" in answer.body
    assert upstream.seen == []


async def test_fifty_megabytes_of_headers_fill_no_memory(tmp_path: Path, upstream: Upstream) -> None:
    line = b"X-Padding: " + b"x" * 8000 + b"\r\n"

    async def attack(proxy: Proxy) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\n" % upstream.port)
        try:
            for _ in range(50_000_000 // len(line)):
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            pass  # it need not listen to all of it
        try:
            return await asyncio.wait_for(reader.read(100), 20)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async with capture(tmp_path) as proxy:
        assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain/0")).status == 200
        before = peak(proxy)
        attacks = [asyncio.create_task(attack(proxy)) for _ in range(4)]
        served = 0
        while not all(task.done() for task in attacks) or served < 5:
            served += 1
            assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain/{served}")).status == 200
        answers = [task.result() for task in attacks]
        assert any(answer.startswith(b"HTTP/1.1 431 ") for answer in answers)
        assert peak(proxy) - before < 16_000, "kB"
        await proxy.until(lambda events: len(errors(events)) == 4 and len(flows(events)) == served + 1)


def peak(proxy: Proxy) -> int:
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


async def test_http2_above_the_fields(proxy: Proxy, upstream_tls: Upstream, tmp_path: Path) -> None:
    url = f"https://localhost:{upstream_tls.port}/many"
    (tmp_path / "fit").write_text("".join(f"x-{number}: 1\n" for number in range(900)))
    (tmp_path / "many").write_text("".join(f"x-{number}: 1\n" for number in range(1_100)))
    fit = await curl(proxy, url, "--http2", "-H", f"@{tmp_path / 'fit'}")
    assert (fit.code, fit.status, fit.body) == (0, 200, b"h2 /many")
    answer = await curl(proxy, url, "--http2", "-H", f"@{tmp_path / 'many'}")
    assert (answer.code, answer.status) == (0, 431) and b"1,000 fields" in answer.body
    found = await proxy.until(lambda events: bool(errors(events)))
    failed, completed = [event for event in found if event.seq and event.client.alpn == "h2"], flows(found)
    assert len(completed) == 1 and len(failed) == 2 and errors(found)[0].failure.error_type is ErrorType.PROTOCOL_ERROR


async def big_over_h2(proxy: Proxy, target: str, size: int) -> tuple[bytes, bool]:
    """The status that a head of `size` bytes, as HTTP/1 counts, gets, and whether the proxy closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    context = ssl.create_default_context(cafile=str(proxy.ca))
    context.set_alpn_protocols(["h2"])
    await writer.start_tls(context, server_hostname="localhost")
    conn = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    conn.initiate_connection()
    pseudo = [(":method", "GET"), (":scheme", "https"), (":authority", target), (":path", "/big")]
    used = sum(len(name) + len(value) + 4 for name, value in pseudo)
    padding = [(f"x-{number}", "@" * 8000) for number in range((size - used) // 8100)]
    used += sum(len(name) + len(value) + 4 for name, value in padding)
    conn.send_headers(1, [*pseudo, *padding, ("z", "z" * (size - used - 5))], end_stream=True)
    writer.write(conn.data_to_send())
    found, closed = b"", False
    with contextlib.suppress(ConnectionError):
        while not closed and found != b"200" and (data := await asyncio.wait_for(reader.read(65536), 20)):
            for event in conn.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    found = dict(event.headers or ())[b":status"]  # type: ignore[index,assignment]
                closed = closed or isinstance(event, h2.events.ConnectionTerminated)
    writer.close()
    return found, closed


@pytest.mark.parametrize(("size", "status"), [(MAX_BYTES - 100, b"200"), (MAX_BYTES + 1, b"431"), (1 << 21, b"")])
async def test_http2_bytes(proxy: Proxy, authority: trustme.CA, size: int, status: bytes) -> None:
    """Up to a megabyte the answer is 431, above it the connection's end; curl cannot send that much over HTTP/2."""
    async with RawServer(answering_h2, tls=server_context(authority, "localhost", alpn=("h2",))) as upstream:
        target = f"localhost:{upstream.port}"
        found, closed = await asyncio.wait_for(big_over_h2(proxy, target, size), 20)
    assert found == status and closed == (status != b"200")
    if closed:
        recorded = await proxy.until(lambda events: bool(errors(events)))
        [event] = errors(recorded)
        assert event.failure.error_type is ErrorType.PROTOCOL_ERROR and event.url == f"https://{target}/"


@pytest.mark.parametrize("over", ["", "bytes", "fields", "endless"])
async def test_response_heads(proxy: Proxy, over: str) -> None:
    async def script(talk: Talk) -> None:
        await talk.head()
        count = MAX_FIELDS + (over == "fields")
        fields = [b"Content-Length: 2", *(b"a%d: 1" % number for number in range(count - 2)), b"Z: "]
        head = b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(fields)
        if over == "fields":
            await talk.say(head + b"\r\n\r\nok")
        elif over == "endless":
            while True:
                await talk.say(b"X-More: " + b"x" * 8000 + b"\r\n")
        else:
            await talk.say(head + b"z" * (MAX_BYTES - len(head) - 4 + (over == "bytes")) + b"\r\n\r\nok")

    async with RawServer(script) as upstream:
        answer, _ = await converse(proxy, b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
    assert answer.startswith(b"HTTP/1.1 502 " if over else b"HTTP/1.1 200 ")
    found = await proxy.until(lambda events: any(event.seq for event in events))
    [event] = [event for event in found if event.seq]
    if over:
        assert isinstance(event, FlowFailed) and event.failure.error_type is ErrorType.PROTOCOL_ERROR
        assert "response head" in event.failure.message
    else:
        assert isinstance(event, FlowCompleted) and len(event.response.headers) > MAX_BYTES - 8000  # type: ignore[union-attr]


async def test_http2_response_head(proxy: Proxy, authority: trustme.CA) -> None:
    """The stream fails; the connection to the server and to the client go on."""

    async with RawServer(answering_h2, tls=server_context(authority, "localhost", alpn=("h2",))) as upstream:
        url = f"https://localhost:{upstream.port}"
        answer = await curl(
            proxy,
            f"{url}/many",
            "--http2",
            "--next",
            "-sS",
            "-x",
            proxy.url,
            "--cacert",
            str(proxy.ca),
            f"{url}/few",
            "-o",
            "/dev/null",
        )
        assert answer.code == 0 and len(upstream.talks) == 1
    found = await proxy.until(lambda events: len([event for event in events if event.seq]) == 2)
    by_path = {event.request.target: event for event in found if event.seq}
    assert isinstance(by_path[b"/few"], FlowCompleted)
    failed = by_path[b"/many"]
    assert isinstance(failed, FlowFailed) and failed.failure.error_type is ErrorType.PROTOCOL_ERROR


async def test_endless_trailers_and_pipelined_heads_are_bounded(proxy: Proxy, upstream: Upstream) -> None:
    """What may come after a head: a chunk's size line, trailers, and the next request while the first waits."""
    upstream.release.clear()
    base = f"http://127.0.0.1:{upstream.port}"
    chunked = f"POST {base}/count HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for start_of in (
        chunked + b"0\r\nX: ",
        chunked + b"1" + b";x",
        f"GET {base}/hang HTTP/1.1\r\nHost: x\r\n\r\nGET {base}/ HTTP/1.1\r\nX: ".encode(),
    ):
        _, closed = await converse(proxy, start_of + b"x" * (MAX_BYTES + 200_000))
        assert closed
    upstream.release.set()
    found = await proxy.until(lambda events: len([event for event in events if event.seq]) == 3)
    assert [event.failure.error_type for event in flows(found, FlowFailed)] == [ErrorType.PROTOCOL_ERROR] * 3
