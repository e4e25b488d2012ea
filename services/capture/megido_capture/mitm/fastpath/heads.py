"""Request heads over HTTP/1 as almost all are: whole, small, and of plain lines.

What such a head cannot have needs no look: it is not too large, not cut short, and has no line that readers could
disagree about. So the wrappers around `Http1Server.read_headers` (`headguard`, `httpmend`) are left out for it. Any
other goes through them, and so does one that does not parse.
"""

import re
from collections.abc import Callable
from typing import Any

from mitmproxy.net.http import http1
from mitmproxy.proxy import events
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import _http1
from mitmproxy.proxy.layers.http._base import ReceiveHttp
from mitmproxy.proxy.layers.http._events import RequestHeaders

AT_MOST = 3000
"""Bytes. So few are below every cap on heads, on their fields too."""

_PLAIN = re.compile(rb"(?:[!-~][^\r\n]*+\r\n)++\r\n")
"""Lines that end in CR LF, have neither within them, and begin with no white space (which would fold a field)."""

_parse = http1.read_request_head
original: Callable[[_http1.Http1Server, events.ConnectionEvent], CommandGenerator[None]] = (
    _http1.Http1Server.read_headers
)
_others = original


def replace() -> None:
    """To be called again when somebody has wrapped `read_headers`."""
    global _others  # noqa: PLW0603 - as what it stands in front of: one for the process
    found: Any = _http1.Http1Server.read_headers
    if found is not read_headers:
        _others = found
        _http1.Http1Server.read_headers = read_headers  # type: ignore[method-assign]


def read_headers(self: _http1.Http1Server, event: events.ConnectionEvent) -> CommandGenerator[None]:
    """`Http1Server.read_headers`."""
    if type(event) is events.DataReceived and (found := _PLAIN.match(self.buf._data, 0, AT_MOST)):
        return _begin(self, event, found.end())
    return _others(self, event)


def _begin(self: _http1.Http1Server, event: events.ConnectionEvent, size: int) -> CommandGenerator[None]:
    """What it does where the buffer begins with a head of so many bytes."""
    head = bytes(self.buf._data[:size])
    try:
        request = _parse(head[:-4].split(b"\r\n"))
        body_size = http1.expected_http_body_size(request)
    except ValueError:
        yield from _others(self, event)
        return
    self.buf._extract(size)
    self.request = request
    yield ReceiveHttp(RequestHeaders(self.stream_id, request, body_size == 0))
    self.body_reader = _http1.make_body_reader(body_size)
    self.state = self.read_body
    yield from self.state(event)
