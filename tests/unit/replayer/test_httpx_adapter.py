"""The sender behind httpx's interface."""

import socket

import httpx
import pytest

from megido_replayer.transport import Origin, Sender, SendError
from megido_replayer.transport.httpx_adapter import SenderTransport
from tests.support.raw_server import OK, RawServer


async def locate(scheme, host, port):
    return Origin(scheme, host, port, ("127.0.0.1",))


@pytest.fixture
async def client():
    async with httpx.AsyncClient(transport=SenderTransport(Sender(), locate, max_body=10), trust_env=False) as made:
        yield made


async def answering(talk):
    while True:
        await talk.head()
        await talk.say(OK)


def request(server, **fields):
    return httpx.Request(**({"method": "GET", "url": f"http://name.test:{server.port}/a"} | fields))


async def test_a_request_built_by_hand_keeps_its_bytes(client):
    async with RawServer(answering) as server:
        asked = request(
            server, headers=[(b"hOST", b"x"), (b"A", b"1"), (b"a", b"\xff")], extensions={"target": b"//b/../%7e?\xff"}
        )
        answer = await client.send(asked)
    assert server.received == [b"GET //b/../%7e?\xff HTTP/1.1\r\nhOST: x\r\nA: 1\r\na: \xff\r\n\r\n"]
    assert (answer.status_code, answer.content, answer.reason_phrase, answer.http_version) == (
        200,
        b"ok",
        "OK",
        "HTTP/1.1",
    )
    assert answer.extensions["raw"].body_size == 2


async def test_an_ordinary_call_works_and_is_capped(client):
    async def script(talk):
        head = await talk.head()
        assert b"content-length: 7" in head.lower()
        assert await talk.exactly(7) == b'{"a":1}'
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\nA: 1\r\nA: 2\r\n\r\n" + b"x" * 20)

    async with RawServer(script) as server:
        answer = await client.post(f"http://name.test:{server.port}/", json={"a": 1})
    assert answer.content == b"x" * 10
    assert answer.headers.get_list("a") == ["1", "2"]
    assert (answer.extensions["raw"].truncated, answer.extensions["raw"].body_size) == (True, 20)


async def test_errors_are_httpx_errors(client):
    async def silent(talk):
        await talk.rest()

    async def odd(talk):
        await talk.head()
        await talk.say(b"odd\r\n\r\n")

    async def cut(talk):
        await talk.head()

    async with RawServer(silent) as slow, RawServer(odd) as strange, RawServer(cut) as short:
        with pytest.raises(httpx.ReadTimeout) as raised:
            await client.get(f"http://name.test:{slow.port}/", timeout=0.2)
        assert isinstance(raised.value.__cause__, SendError)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get(f"http://name.test:{strange.port}/")
        with pytest.raises(httpx.ReadError):
            await client.get(f"http://name.test:{short.port}/")
        with pytest.raises(httpx.LocalProtocolError):
            await client.send(request(slow, headers=[(b"A", b"1\r\nB: 2")]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://name.test:{taken.getsockname()[1]}/")
