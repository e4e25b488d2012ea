"""What has ended is taken apart: the layers of a connection, and the stream of each exchange.

A layer of mitmproxy refers to itself (its next step is a bound method), to its context and to its children. So what
it held (flows, buffers, TLS sessions) waits for a collection of the garbage collector, which comes the later the
fewer Python objects there are: with ever new connections that is hundreds of megabytes, and then a collection that
stops the loop for a good while. Taken apart it is freed at once.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mitmproxy.proxy import events, layer
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import HttpLayer, HttpStream

if TYPE_CHECKING:
    from megido_capture.mitm.fastpath.handler import Handler

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
    """`HttpLayer.streams`, which tells the handler what was dropped."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context

    def pop(self, stream_id: int, default: Any = None) -> Any:
        """As mitmproxy calls it, to drop a stream."""
        found = super().pop(stream_id, default)
        handler: Handler | None = self._context.handler  # type: ignore[attr-defined]
        if found is not None and handler is not None:
            handler.dropped.append(found)
        return found


def empty(dropped: list[HttpStream]) -> None:
    """Lets go of what these streams hold. Only when no event is being handled: a stream drops itself, and has a few
    steps to go. One that waits for something still, as when its client left meanwhile, is left as it is."""
    for stream in dropped:
        held = vars(stream)
        if held and stream._paused is None:
            stream.context.layers.clear()
            held.clear()
            held.update(_NOTHING)
    dropped.clear()


def take_apart(top: layer.Layer) -> None:
    """Every layer below and beside `top`. Only for a connection of which nothing is left to be handled."""
    waiting: list[Any] = [top]
    found: dict[int, layer.Layer] = {}
    while waiting:
        value = waiting.pop()
        if isinstance(value, layer.Layer):
            held = vars(value)
            if id(value) not in found and "context" in held:  # else it has been emptied
                found[id(value)] = value
                waiting.extend(held.values())
                waiting.extend(value.context.layers)
        elif isinstance(value, dict):
            waiting.extend(value.values())
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
    self.streams = Streams(self.context)


def _ignored(event: events.Event) -> layer.CommandGenerator[None]:
    yield from ()


_NOTHING = {"_handle_event": _ignored, "_paused": None, "debug": None}
"""What a layer needs to take an event, and to do nothing."""
