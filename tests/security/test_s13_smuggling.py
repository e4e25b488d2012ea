"""Line 13: requests that two readers could take for different ones are refused, and nobody can switch that off."""

import asyncio
import sys
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from h11._receivebuffer import ReceiveBuffer

from megido_capture.mitm.framing import head_flaw
from megido_shared.events import ErrorRaised, ErrorType, FlowCompleted, FlowFailed
from tests.integration.capture.harness import ROOT, Proxy, curl, flows, run
from tests.integration.capture.test_slow_clients import secured
from tests.integration.capture.upstream import Upstream
from tests.support.raw_server import RawServer, Talk

pytestmark = pytest.mark.timeout(90)

HEADS = {
    "length and chunked": "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    "chunked and length": "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    "two lengths": "Content-Length: 5\r\nContent-Length: 6\r\n",
    "two equal lengths": "Content-Length: 5\r\nContent-Length: 5\r\n",
    "a list of lengths": "Content-Length: 5, 5\r\n",
    "a signed length": "Content-Length: +5\r\n",
    "a negative length": "Content-Length: -5\r\n",
    "a length with underscores": "Content-Length: 1_0\r\n",
    "a hexadecimal length": "Content-Length: 0x5\r\n",
    "a length of other digits": "Content-Length: \u0665\r\n",
    "a space before the colon": "Content-Length : 5\r\n",
    "a tab before the colon": "Transfer-Encoding\t: chunked\r\n",
    "a name with a space": "X Content-Length: 5\r\n",
    "no name": ": 5\r\n",
    "no colon": "Content-Length 5\r\n",
    "a folded field": "X: a\r\n b\r\n",
    "a folded coding": "Transfer-Encoding:\r\n chunked\r\n",
    "a fold by a tab": "X: a\r\n\tContent-Length: 5\r\n",
    "a bare LF": "X: a\nContent-Length: 5\r\n",
    "a bare CR": "X: a\rContent-Length: 5\r\n",
    "a name with a CR": "X\r: 5\r\n",
    "two codings": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    "another coding last": "Transfer-Encoding: chunked, identity\r\n",
    "an unknown coding": "Transfer-Encoding: xchunked\r\n",
    "quoted": 'Transfer-Encoding: "chunked"\r\n',
    "chunked twice": "Transfer-Encoding: chunked, chunked\r\n",
    "no coding": "Transfer-Encoding:\r\nContent-Length: 5\r\n",
}
LINES = {
    "an unknown version": "GET http://{host}/ HTTP/1.1x",
    "no version": "GET http://{host}/",
    "a space in the target": "GET http://{host}/a b HTTP/1.1",
    "no scheme": "GET {host} HTTP/1.1",
    "another scheme": "GET ftp://{host}/ HTTP/1.1",
    "a bare LF after the line": "GET http://{host}/ HTTP/1.1\nX: y",
}


async def answer_to(proxy: Proxy, data: bytes) -> bytes:
    """Everything until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return answer


@pytest.mark.parametrize("name", HEADS)
async def test_ambiguous_heads(proxy: Proxy, upstream: Upstream, name: str) -> None:
    body = b"0\r\n\r\nGET http://127.0.0.1:%d/smuggled HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port
    head = f"POST http://127.0.0.1:{upstream.port}/front HTTP/1.1\r\nHost: x\r\n{HEADS[name]}\r\n".encode()
    answer = await answer_to(proxy, head + body)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1
    await _refused(proxy, upstream)


async def test_nobody_is_told_to_switch_the_check_off(proxy: Proxy) -> None:
    """As mitmproxy's own words do, in the answer and in what is recorded; also of servers."""

    async def ambiguous(talk: Talk) -> None:
        await talk.head()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx")

    async with RawServer(ambiguous) as server:
        url = f"http://127.0.0.1:{server.port}/"
        body = (await curl(proxy, url)).body
        body += await answer_to(proxy, f"POST {url} HTTP/1.1\r\nHost: x\r\n{HEADS['two lengths']}\r\nhello".encode())
    found = await proxy.until(lambda events: len(flows(events, FlowFailed)) == 2)
    said = [body.decode(), *(event.failure.message for event in flows(found, FlowFailed))]
    assert not [text for text in said if "validate_inbound_headers" in text]


@pytest.mark.parametrize("name", LINES)
async def test_ambiguous_request_lines(proxy: Proxy, upstream: Upstream, name: str) -> None:
    line = LINES[name].format(host=f"127.0.0.1:{upstream.port}")
    answer = await answer_to(proxy, f"{line}\r\nHost: x\r\n\r\nGET http://127.0.0.1/ HTTP/1.1\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1
    await _refused(proxy, upstream)


async def _refused(proxy: Proxy, upstream: Upstream) -> None:
    assert upstream.seen == []
    # What comes of a good request is behind all that came of the refused one.
    assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status == 200
    found = await proxy.until(lambda events: bool(flows(events)))
    [event] = [event for event in found if not isinstance(event, FlowCompleted)]
    assert isinstance(event, FlowFailed | ErrorRaised) and event.failure.error_type is ErrorType.PROTOCOL_ERROR


CHUNKS = {
    "a size that is none": b"xyz\r\nhello\r\n0\r\n\r\n",
    "a signed size": b"+5\r\nhello\r\n0\r\n\r\n",
    "a size with 0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a size with a space": b"5 \nhello\r\n0\r\n\r\n",
    "a size too long": b"f" * 30 + b"\r\nhello\r\n0\r\n\r\n",
    "an LF for a CR LF": b"5\nhello\n0\n\n\r\n",
    "an LF in an extension": b"5;a=\nb\r\nhello\r\n0\r\n\r\n",
    "more data than the size says": b"5\r\nhelloGET / HTTP/1.1\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", CHUNKS)
async def test_ambiguous_chunks(proxy: Proxy, upstream: Upstream, name: str) -> None:
    """A chunked body streams, so its beginning may be with the server; its end never is."""
    head = b"POST http://127.0.0.1:%d/echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % upstream.port
    answer = await answer_to(proxy, head + CHUNKS[name])
    assert b" 200 " not in answer.split(b"\r\n")[0]
    found = await proxy.until(lambda events: bool(flows(events, FlowFailed)))
    [event] = flows(found, FlowFailed)
    assert event.failure.error_type is ErrorType.PROTOCOL_ERROR


async def test_an_extension_goes_no_further(proxy: Proxy, upstream: Upstream) -> None:
    head = (
        b"POST http://127.0.0.1:%d/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = await answer_to(proxy, head % upstream.port + b'5;ext="a;b"\r\nhello\r\n0;x\r\n\r\n')
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello") and b"ext" not in answer


H2_FIELDS = {
    "a CR LF in a value": (b"x", b"a\r\nx-smuggled: 1"),
    "an LF in a value": (b"x", b"a\nx-smuggled: 1"),
    "a CR LF in a name": (b"x\r\nx-smuggled", b"1"),
    "a colon in a name": (b"x-smuggled: 1", b"1"),
    "an upper case name": (b"X-Smuggled", b"1"),
    "a connection field": (b"transfer-encoding", b"chunked"),
    "another length": (b"content-length", b"3"),
    "a second path": (b":path", b"/smuggled"),
    "a NUL in a value": (b"x-smuggled", b"\0"),
}


@pytest.mark.parametrize("name", H2_FIELDS)
async def test_http2_fields_that_http1_would_take_apart(proxy: Proxy, upstream_tls: Upstream, name: str) -> None:
    config = h2.config.H2Configuration(
        client_side=True, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    client = h2.connection.H2Connection(config)
    client.initiate_connection()
    fields = [(b":method", b"POST"), (b":path", b"/echo"), (b":scheme", b"https"), (b":authority", b"localhost")]
    client.send_headers(1, [*fields, H2_FIELDS[name]])
    client.send_data(1, b"hello", end_stream=True)
    reader, writer = await secured(proxy, upstream_tls.port, "h2")
    writer.write(client.data_to_send())
    while not await _refused_by(client, reader):
        pass
    writer.close()
    assert upstream_tls.seen == []
    found = await proxy.until(lambda events: any(hasattr(event, "failure") for event in events))
    [event] = [event for event in found if hasattr(event, "failure")]
    assert event.failure.error_type is ErrorType.PROTOCOL_ERROR


async def _refused_by(client: h2.connection.H2Connection, reader: asyncio.StreamReader) -> bool:
    """Whether the stream or the connection was ended; no response may come."""
    data = await asyncio.wait_for(reader.read(65536), 20)
    for event in client.receive_data(data):
        if isinstance(event, h2.events.ResponseReceived):
            assert dict(event.headers or ())[b":status"] == b"400"
            return True
        if isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
            return True
    return not data


def test_a_clean_head_has_no_flaw() -> None:
    def flaw(data: bytes) -> str:
        buf = ReceiveBuffer()
        buf += data
        return head_flaw(buf)

    clean = b"POST / HTTP/1.1\r\nHost: x\r\nX: a  b\t\xff\x00\r\n\r\n"
    for after in (b"", b"a\nb\rc\r\n\r\n d\n\te"):
        assert flaw(clean + after) == ""
    assert flaw(clean[:-2]) == flaw(b"") == flaw(b"GET / HTTP/1.1\n") == ""
    assert flaw(b"GET / HTTP/1.1\n\n") and flaw(b"GET / HTTP/1.1\r\n\n") and flaw(b"GET / HTTP/1.1\n\r\n")


async def test_validation_cannot_be_switched_off(tmp_path: Path) -> None:
    option = ("--set", "validate_inbound_headers=false")
    service = (sys.executable, "-m", "megido_capture", "--data-dir", str(tmp_path), "--metrics-port", "0")
    code, printed = await run(*service, "--no-forwarder", "--listen-port", "0", *option)
    assert code != 0 and "validate_inbound_headers" in printed and len(printed.strip().splitlines()) == 1
    tool = (str(Path(sys.executable).parent / "mitmdump"), "-p", "0", *option)
    script = ("-s", str(ROOT / "services/capture/addon.py"), "--set", f"megido_data_dir={tmp_path}")
    code, printed = await run(*tool, *script, "--set", "megido_forwarder=false")
    assert code != 0 and "validate_inbound_headers" in printed
