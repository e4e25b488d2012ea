"""A request head is read as mitmproxy reads it, and what is unusual goes to the wrappers."""

from collections.abc import Callable, Iterator

import pytest
from mitmproxy import options
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import _base, _events, _http1
from mitmproxy.test import tflow

from megido_capture.mitm.fastpath import heads

PLAIN = (
    b"GET http://a:80/x?y=1 HTTP/1.1\r\nHost: a\r\nX-A:  1 \r\nx-a:\xff\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"CONNECT a:443 HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
)
BROKEN = (
    b"NONSENSE\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
)
UNUSUAL = (
    b"GET / HTTP/1.1\r\nHost: a\r\n",
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * heads.AT_MOST + b"\r\n\r\n",
    b"",
)

type Read = Callable[[_http1.Http1Server, events.ConnectionEvent], Iterator[commands.Command]]


def read_by(read: Read, data: bytes) -> tuple[list[str], bytes, str]:
    """The commands of a layer that gets `data`, what is left of it, and the layer's next step."""
    client = tflow.tclient_conn()
    client.id = "same"
    layer = _http1.Http1Server(Context(client, options.Options()))
    layer.state = layer.read_headers
    layer.buf += data
    told = [_shown(command) for command in read(layer, events.DataReceived(client, data))]
    return told, bytes(layer.buf), layer.state.__name__


def _shown(command: commands.Command) -> str:
    if isinstance(command, commands.SendData):
        return f"send {command.data!r}"
    if isinstance(command, _base.ReceiveHttp) and isinstance(command.event, _events.RequestHeaders):
        state = command.event.request.get_state()
        state["timestamp_start"] = 0
        return f"{state} {command.event.end_stream}"
    return repr(command)


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What came to the function behind ours, which is mitmproxy's."""
    seen: list[bytes] = []
    original = heads.original

    def others(self: _http1.Http1Server, event: events.ConnectionEvent) -> Iterator[commands.Command]:
        seen.append(bytes(self.buf))
        return original(self, event)

    monkeypatch.setattr(heads, "_others", others)
    monkeypatch.setattr(_http1.Http1Server, "read_headers", heads.read_headers)
    return seen


@pytest.mark.parametrize("data", [*PLAIN, *BROKEN, *UNUSUAL])
def test_same_as_mitmproxy(wrapped: list[bytes], data: bytes) -> None:
    assert read_by(heads.read_headers, data) == read_by(heads.original, data)


@pytest.mark.parametrize(("data", "through"), [(each, []) for each in PLAIN] + [(e, [e]) for e in BROKEN + UNUSUAL])
def test_what_the_wrappers_see(wrapped: list[bytes], data: bytes, through: list[bytes]) -> None:
    read_by(heads.read_headers, data)
    assert wrapped == through
