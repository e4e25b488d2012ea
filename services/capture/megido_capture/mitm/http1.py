"""Mends mitmproxy's HTTP layers where a peer's error leaves no trace, or makes the layer crash and the peer hang."""

import html
import re
from typing import Any, Protocol

import h2.errors
from h11._events import EndOfMessage
from h11._readers import ChunkedReader
from h11._receivebuffer import ReceiveBuffer
from mitmproxy import connection
from mitmproxy.proxy import commands, events
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers.http import _events, _http1, _http2

_ADVICE = "Disable the validate_inbound_headers option to skip this security check."

_PLACES = (
    (_http1, "ChunkedReader"),
    (_http1.Http1Server, "read_headers"),
    (_http1.Http1Server, "send"),
    (_http1.Http1Client, "send"),
    (_http2.Http2Server, "protocol_error"),
    (_http1, "format_error"),
    (_http2, "format_error"),
)
_ERROR_PAGE = re.compile(rb"<p>(.*?)</p>", re.DOTALL)
_INSTEAD_OF = "_megido_instead_of"


class Observer(Protocol):
    def bad_request(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        """A client sent what is no request, or one without a destination. There is no flow."""


def mend(observer: Observer) -> None:
    """Puts the mended parts into mitmproxy.

    - A request head that cannot be parsed, one that names no host, and an HTTP/2 protocol error while no stream is
      open are told to `observer`: mitmproxy answers 400 or closes, and has no hook.
    - Trailers that come or would go over HTTP/1 are dropped, as RFC 9110 (6.5.1) allows: mitmproxy raises
      NotImplementedError or AssertionError, and both sides wait for ever.
    - Error pages do not advise to switch off what protects.
    """
    originals = [_original(getattr(owner, name)) for owner, name in _PLACES]
    read_headers, send, client_send, protocol_error, format_error = originals[1:6]

    def mended_read_headers(self: _http1.Http1Server, event: events.ConnectionEvent) -> CommandGenerator[None]:
        step = read_headers(self, event)
        first = next(step, None)
        if first is None:
            return
        if self.request is None and isinstance(first, commands.SendData) and first.data.startswith(b"HTTP/1.1 400 "):
            observer.bad_request(self.context.client, _reason(first.data), self.context.server.address)
        yield first
        yield from step

    def mended_send(self: _http1.Http1Server, event: _events.HttpEvent) -> CommandGenerator[None]:
        if (
            type(event) is _events.ResponseProtocolError
            and event.code is _events.ErrorCode.DESTINATION_UNKNOWN
            and self.response is None
        ):
            observer.bad_request(self.context.client, event.message, None)
        return _nothing() if type(event) is _events.ResponseTrailers else send(self, event)

    def mended_client_send(self: _http1.Http1Client, event: _events.HttpEvent) -> CommandGenerator[None]:
        return _nothing() if type(event) is _events.RequestTrailers else client_send(self, event)

    def mended_protocol_error(
        self: _http2.Http2Server, message: str, error_code: int = h2.errors.ErrorCodes.PROTOCOL_ERROR
    ) -> CommandGenerator[None]:
        if not self.streams:
            observer.bad_request(self.context.client, message, self.context.server.address)
        ended: CommandGenerator[None] = protocol_error(self, message, error_code)
        return ended

    def mended_page(status: int, message: str) -> bytes:
        page: bytes = format_error(status, without_advice(message))
        return page

    mended = (mended_read_headers, mended_send, mended_client_send, mended_protocol_error, mended_page, mended_page)
    made: tuple[Any, ...] = (_WithoutTrailers, *mended)
    for (owner, name), replacement, original in zip(_PLACES, made, originals, strict=True):
        setattr(replacement, _INSTEAD_OF, original)
        setattr(owner, name, replacement)


def without_advice(message: str) -> str:
    """mitmproxy's text without the advice to switch a check off that Megido never switches off."""
    return message.replace(_ADVICE, "This check cannot be switched off.")


def stop_mending() -> None:
    """Takes the mended parts out again."""
    for owner, name in _PLACES:
        setattr(owner, name, _original(getattr(owner, name)))


def _original(found: Any) -> Any:
    """What stood at a place before us, if it is ours."""
    return vars(found).get(_INSTEAD_OF, found)


class _WithoutTrailers(ChunkedReader):
    def __call__(self, buf: ReceiveBuffer) -> Any:
        event = super().__call__(buf)
        return EndOfMessage() if isinstance(event, EndOfMessage) and event.headers else event


def _nothing() -> CommandGenerator[None]:
    yield from ()


def _reason(answer: bytes) -> str:
    """What mitmproxy's error page says."""
    found = _ERROR_PAGE.search(answer)
    return f"bad HTTP/1 request: {html.unescape(found[1].decode(errors='replace'))}" if found else "bad HTTP/1 request"
