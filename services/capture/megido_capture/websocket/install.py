"""Puts our classes into mitmproxy's WebSocket layer, and takes them out again."""

import wsproto.extensions
from mitmproxy.proxy.layers import websocket as layer
from wsproto.extensions import PerMessageDeflate

from megido_capture.websocket import closing
from megido_capture.websocket.frames import Observer, connection_class, deflate_class
from megido_capture.websocket.recording import STOPPING

_originals = (layer.WebsocketConnection, PerMessageDeflate)


def observe(observer: Observer) -> None:
    """Puts two classes of ours between mitmproxy's WebSocket layer and wsproto, which both make their objects from a
    name in a module. Each PING and PONG is told to `observer`, and a message that grows past `observer.max_message`
    ends the connection with 1009, before it is held."""
    _put(connection_class(observer, closing.told, STOPPING), deflate_class(observer))
    closing.put()


def stop_observing() -> None:
    """Takes our classes out again."""
    _put(*_originals)
    closing.take_out()


def _put(relayed: type[layer.WebsocketConnection], deflate: type[PerMessageDeflate]) -> None:
    setattr(layer, "WebsocketConnection", relayed)  # noqa: B010 - mypy refuses an assignment to a class
    setattr(wsproto.extensions, "PerMessageDeflate", deflate)  # noqa: B010
