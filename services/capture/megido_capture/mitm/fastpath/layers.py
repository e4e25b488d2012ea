"""The layers' machinery: how hooks are waited for, and how contexts are made.

A layer that yields a blocking command is paused, its command climbs to the handler, and the answer comes back down
through all layers as an event. For the hooks of an HTTP/1 exchange, when nothing is left to wait for, that way changes
nothing: here they are called where they are yielded, and the stream goes on. Only there, because elsewhere the way
orders things: an HTTP/2 connection must first have read all that came with a frame, and a server's answer must have
ended before a request that was sent ahead (pipelining) begins.

Only under our own handler, which puts itself into the context; a layer without it works as before.
"""

from typing import TYPE_CHECKING, Any

from mitmproxy.proxy import commands, context, events
from mitmproxy.proxy.layer import CommandGenerator, Layer, Paused
from mitmproxy.proxy.layers.http import GetHttpConnectionCompleted, HttpStream, _hooks, _http1

if TYPE_CHECKING:
    from megido_capture.mitm.fastpath.handler import Handler

_HTTP1 = (None, b"", b"http/1.1", b"http/1.0")
"""What was negotiated with the client where mitmproxy speaks HTTP/1 with it."""

_MADE_OFTEN = (
    _hooks.HttpRequestHeadersHook,
    _hooks.HttpRequestHook,
    _hooks.HttpResponseHeadersHook,
    _hooks.HttpResponseHook,
    GetHttpConnectionCompleted,
    events.HookCompleted,
)
"""What is made for each exchange, and checked each time that its class is a dataclass and none of the base classes."""

_original_handle_event = Layer.handle_event
_original_mark_done = _http1.Http1Server.mark_done


def replace() -> None:
    context.Context.handler = None  # type: ignore[attr-defined]
    context.Context.fork = fork  # type: ignore[method-assign]
    Layer.handle_event = _handle_event  # type: ignore[method-assign]
    Layer._Layer__process = _process  # type: ignore[attr-defined]
    _http1.Http1Server.mark_done = _mark_done  # type: ignore[method-assign]
    for made in _MADE_OFTEN:
        made.__new__ = _new  # type: ignore[method-assign]


def _new(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
    return object.__new__(cls)


def fork(self: context.Context) -> context.Context:
    """`Context.fork`, which makes a server with a UUID only to throw it away."""
    made = context.Context.__new__(context.Context)
    made.__dict__.update(self.__dict__)
    made.layers = self.layers.copy()
    return made


def _handle_event(self: Layer, event: events.Event) -> CommandGenerator[None]:
    if self._paused or self.debug is not None:
        return _original_handle_event(self, event)
    return _process(self, self._handle_event(event))


def _process(self: Layer, generator: CommandGenerator[Any], send: Any = None) -> CommandGenerator[None]:
    """`Layer.__process`, and its copy in `handle_event`, with hooks in place."""
    try:
        command = generator.send(send)
    except StopIteration:
        return
    while True:
        if command.blocking is not True:
            yield command
        elif type(self) is not HttpStream or not _ended(self, command):
            command.blocking = self
            self._paused = Paused(command, generator)
            yield command
            return
        try:
            command = next(generator)
        except StopIteration:
            return


def _ended(self: HttpStream, command: commands.Command) -> bool:
    """Whether the command is a hook that needs no waiting: its functions have been called, and have ended."""
    handler: Handler | None = self.context.handler  # type: ignore[attr-defined]
    if handler is None or not handler.in_place or not isinstance(command, commands.StartHook):
        return False
    return self.context.client.alpn in _HTTP1 and handler.start_hook(command)


def _mark_done(self: _http1.Http1Server, *, request: bool = False, response: bool = False) -> CommandGenerator[None]:
    """The end of an exchange is where a request that was sent ahead begins: its hooks go the long way."""
    handler: Handler | None = self.context.handler  # type: ignore[attr-defined]
    if handler is None or not self.buf:
        return _original_mark_done(self, request=request, response=response)
    return _ahead(handler, _original_mark_done(self, request=request, response=response))


def _ahead(handler: "Handler", generator: CommandGenerator[None]) -> CommandGenerator[None]:
    before, handler.in_place = handler.in_place, False
    try:
        yield from generator
    finally:
        handler.in_place = before
