"""Interim responses of HTTP/1 servers (1xx but 101), which mitmproxy takes for the final one: the client gets a 103 and
no end, and the answer behind it is thrown away.

They are passed over. That loses a hint: 100 is said by mitmproxy itself, and 103 helps who loads ahead.
"""

from mitmproxy.proxy import events
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import _http1

_SHOWS = len(b"HTTP/1.1 103")

_original = _http1.Http1Client._handle_event


def skip_interim() -> None:
    setattr(_http1.Http1Client, "_handle_event", _handle_event)  # noqa: B010 - mypy refuses an assignment to a class


def stop_skipping() -> None:
    setattr(_http1.Http1Client, "_handle_event", _original)  # noqa: B010


def _handle_event(self: _http1.Http1Client, event: events.Event) -> CommandGenerator[None]:
    if isinstance(event, events.DataReceived) and self.request is not None and self.response is None:
        begins = event.data if not self.buf else bytes(self.buf._data[:_SHOWS]) + event.data[:_SHOWS]
        if _is_interim(begins):
            self.buf += event.data
            while _is_interim(bytes(self.buf._data[:_SHOWS])) and self.buf.maybe_extract_lines():
                pass
            event = events.DataReceived(event.connection, b"")
    return _original(self, event)


def _is_interim(head: bytes) -> bool:
    return head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")) and not head.startswith(b"101", 9)
