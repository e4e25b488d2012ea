"""What has ended is taken apart: the layers of a connection, and the stream of each exchange.

A layer of mitmproxy refers to itself (its next step is a bound method), to its context and to its children. So what
it held (flows, buffers, TLS sessions) waits for a collection of the garbage collector, which comes the later the
fewer Python objects there are: with ever new connections that is hundreds of megabytes, and then a collection that
stops the loop for a good while. Taken apart it is freed at once.
"""

from collections.abc import Iterable
from typing import Any

from mitmproxy.proxy import layer
from mitmproxy.proxy.layers.http import HttpLayer, HttpStream

_original_init = HttpLayer.__init__


def replace() -> None:
    HttpLayer.__init__ = _init  # type: ignore[method-assign]


class Ended:
    """Stands where the layers were: what still comes (a hook that ends late) changes nothing."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def handle_event(self, event: Any) -> Iterable[Any]:
        return ()


class Streams(dict[int, HttpStream]):
    """`HttpLayer.streams`. One that was dropped is taken apart when the next one is: it drops itself, and has a few
    steps to go."""

    dropped: HttpStream | None = None

    def pop(self, stream_id: int, default: Any = None) -> Any:
        """As mitmproxy calls it, to drop a stream."""
        found = super().pop(stream_id, default)
        before, self.dropped = self.dropped, found
        if before is not None and before is not found:
            _empty(before)
        return found


def take_apart(top: layer.Layer) -> None:
    """Every layer below and beside `top`. Only for a connection of which nothing is left to be handled."""
    waiting: list[Any] = [top]
    found: dict[int, layer.Layer] = {}
    while waiting:
        value = waiting.pop()
        if isinstance(value, layer.Layer):
            if id(value) not in found and (held := vars(value)):
                found[id(value)] = value
                waiting.extend(held.values())
                waiting.extend(value.context.layers)
        elif isinstance(value, dict):
            waiting.extend(value.values())
            if isinstance(value, Streams):
                waiting.append(value.dropped)
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
    for each in found.values():
        if each._paused is not None:
            each._paused.generator.close()
    for each in found.values():
        each.context.layers.clear()
        held = vars(each)
        if "h2_conn" in held:
            vars(held["h2_conn"]).clear()  # it calls back into its layer
        held.clear()


def _init(self: HttpLayer, *args: Any, **kwargs: Any) -> None:
    _original_init(self, *args, **kwargs)
    self.streams = Streams()


def _empty(stream: HttpStream) -> None:
    if vars(stream) and stream._paused is None:
        stream.context.layers.clear()
        vars(stream).clear()
