"""What clients did appears in the journal, complete and once."""

import asyncio
from hashlib import sha256

import pytest

from megido_shared.events import FlowCompleted, FlowStarted, unpack_headers
from tests.integration.capture.harness import Proxy, body, curl, flows
from tests.integration.capture.upstream import Upstream, body_of_size


async def test_http_exchange_is_recorded_as_it_crossed_the_wire(proxy: Proxy, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain/one?a=%20b&a=c"
    answer = await curl(proxy, url, "-H", "X-Case: Kept", "-H", "x-case: twice", "-d", "k=v")
    assert (answer.status, answer.body) == (200, b'{"answer": "one?a=%20b&a=c"}')
    found = await proxy.events()
    [flow] = flows(found)
    request = flow.request
    assert (request.method, request.scheme, request.host, request.port) == (b"POST", "http", "127.0.0.1", upstream.port)
    assert (request.target, request.http_version, request.body.data) == (b"/plain/one?a=%20b&a=c", "HTTP/1.1", b"k=v")
    sent = unpack_headers(request.headers)
    assert (b"X-Case", b"Kept") in sent and (b"x-case", b"twice") in sent
    assert (flow.response.status, flow.response.reason, flow.response.body.data) == (200, b"OK", answer.body)
    received = unpack_headers(flow.response.headers)
    assert (b"X-Two", b"1") in received and (b"x-two", b"2") in received
    assert (flow.client.ip, flow.server.ip, flow.server.port) == ("127.0.0.1", "127.0.0.1", upstream.port)
    assert flow.timing.connect_us >= 0 and 0 <= flow.timing.first_byte_us <= flow.timing.response_us
    assert (flow.node, flow.source_app) == ("capture-0", "browser") and flow.seq > 0


async def test_a_reused_connection_reports_its_connect_time_once(proxy: Proxy, upstream: Upstream) -> None:
    base = f"http://127.0.0.1:{upstream.port}/plain/"
    assert (await curl(proxy, base + "a", base + "b", "-o", "/dev/null")).status == 200
    first, second = flows(await proxy.events())
    assert first.timing.connect_us >= 0 and second.timing.connect_us == -1


@pytest.mark.parametrize(
    ("flag", "version", "alpn"), [("--http1.1", "HTTP/1.1", "http/1.1"), ("--http2", "HTTP/2.0", "h2")]
)
async def test_https(proxy: Proxy, upstream_tls: Upstream, flag: str, version: str, alpn: str) -> None:
    answer = await curl(proxy, f"https://localhost:{upstream_tls.port}/plain/tls", flag)
    assert answer.status == 200
    [flow] = flows(await proxy.events())
    assert (flow.request.scheme, flow.request.http_version, flow.response.http_version) == ("https", version, version)
    assert flow.response.body.data == answer.body
    assert (flow.client.alpn, flow.server.alpn, flow.server.sni) == (alpn, alpn, "localhost")
    assert flow.client.tls.startswith("TLS") and flow.server.tls.startswith("TLS")
    assert flow.timing.tls_us > 0


async def test_http2_without_a_length_streams(proxy: Proxy, upstream_tls: Upstream) -> None:
    answer = await curl(proxy, f"https://localhost:{upstream_tls.port}/nolength/x", "--http2")
    assert answer.body == b"h2 /nolength/x"
    found = await proxy.events()
    [flow] = flows(found)
    assert body(found, flow) == answer.body and flow.response.body.size == len(answer.body)


@pytest.mark.parametrize("framing", ["length", "chunked", "close", "sse"])
async def test_streamed_response(proxy: Proxy, upstream: Upstream, framing: str) -> None:
    size = 200 if framing == "sse" else 700_001
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/{framing}/{size}")
    assert answer.status == 200
    found = await proxy.events()
    [flow] = flows(found)
    stored = flow.response.body
    assert stored.chunks > 0 and not stored.truncated
    assert (stored.size, stored.sha256) == (len(answer.body), sha256(answer.body).digest())
    assert body(found, flow) == answer.body
    if framing != "sse":
        assert answer.body == body_of_size(size)


async def test_cap_bounds_what_is_stored_and_nothing_else(proxy: Proxy, upstream: Upstream) -> None:
    size = (1 << 20) + 300_000
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/length/{size}")
    assert answer.body == body_of_size(size)
    found = await proxy.events()
    [flow] = flows(found)
    stored = flow.response.body
    assert (stored.size, stored.truncated, stored.sha256) == (size, True, sha256(answer.body).digest())
    assert body(found, flow) == answer.body[: 1 << 20]


@pytest.mark.parametrize("how", [(), ("-H", "Transfer-Encoding: chunked"), ("-H", "Expect: 100-continue")])
async def test_large_upload_passes_and_is_recorded(
    proxy: Proxy, upstream: Upstream, tmp_path: object, how: tuple[str, ...]
) -> None:
    upload = body_of_size(900_000)
    path = f"{tmp_path}/upload"
    await asyncio.to_thread(_write, path, upload)
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/count", "--data-binary", f"@{path}", *how)
    assert answer.body == str(len(upload)).encode() and upstream.bodies[-1] == upload
    found = await proxy.events()
    [flow] = flows(found)
    assert flow.request.body.size == len(upload) and flow.request.body.sha256 == sha256(upload).digest()
    assert body(found, flow, "request") == upload


async def test_two_bodies_too_large_for_one_record_go_ahead_of_it(
    proxy: Proxy, upstream: Upstream, tmp_path: object
) -> None:
    upload = body_of_size(500_000)
    path = f"{tmp_path}/upload"
    await asyncio.to_thread(_write, path, upload)
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/echo", "--data-binary", f"@{path}", "-H", "Expect:")
    found = await proxy.events()
    [flow] = flows(found)
    assert body(found, flow, "request") == upload and body(found, flow) == answer.body


async def test_event_stream_reaches_the_client_as_it_comes(proxy: Proxy, upstream: Upstream) -> None:
    upstream.release.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"GET http://127.0.0.1:%d/sse/3 HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
    assert b"data: 0" in await asyncio.wait_for(reader.readuntil(b"data: 0\n\n"), 10)
    found = await proxy.until(lambda events: bool(flows(events, FlowStarted)))  # open for half a second
    [started] = flows(found, FlowStarted)
    assert started.response.status == 200 and not flows(found)
    upstream.release.set()
    await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 10)
    writer.close()
    found = await proxy.until(lambda events: bool(flows(events)))
    [flow] = flows(found, FlowCompleted)
    assert flow.flow_id == started.flow_id and body(found, flow) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


async def test_close_delimited_head_is_recorded_before_its_first_byte(proxy: Proxy, upstream: Upstream) -> None:
    upstream.release.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"GET http://127.0.0.1:%d/close/5000 HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
    await asyncio.wait_for(reader.readexactly(10), 10)
    [started] = flows(await proxy.events(), FlowStarted)
    assert started.response.status == 200
    upstream.release.set()
    await asyncio.wait_for(reader.read(), 10)
    writer.close()


async def test_certificate_is_served_at_mitm_it(proxy: Proxy) -> None:
    page = await curl(proxy, "http://mitm.it/")
    assert page.status == 200 and b"/cert/pem" in page.body
    certificate = await curl(proxy, "http://mitm.it/cert/pem")
    assert certificate.body == proxy.ca.read_bytes()


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
