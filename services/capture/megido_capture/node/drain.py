"""The end of a node's connections when it stops: what is in use may come to its end, the rest is closed at once."""

from collections.abc import Callable

from mitmproxy import connection, http
from mitmproxy.proxy import layer, layers

from megido_capture.counters import Counters, contained
from megido_capture.mitm.handlers import Handlers
from megido_capture.node.unsent import Unsent
from megido_capture.recording.state import ClientState, Registry

SETTLED = 0.5
"""Seconds without a byte and without a flow after which nothing can be on its way: a head may come in pieces."""

QUIET = 1.0
"""The same for a WebSocket or a tunnel. One that is silent so long is not in the middle of anything."""


class Drain:
    """An addon from the moment on that the node stops. Over HTTP/1 each response says that it is the last one on its
    connection; over HTTP/2, where that cannot be said so late, the connection ends when it has no stream."""

    name = "megido-drain"

    def __init__(
        self,
        registry: Registry,
        counters: Counters,
        handlers: Handlers,
        unsent: Unsent,
        *,
        cut: Callable[[connection.Client], bool],
    ) -> None:
        self.counters = counters
        self._registry = registry
        self._handlers = handlers
        self._unsent = unsent
        self._cut = cut
        self._closed: set[str] = set()

    @contained
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        self._say_last(flow)

    @contained
    def response(self, flow: http.HTTPFlow) -> None:
        """Of a response that was arriving when the node was told to stop: its head has not been sent on yet."""
        if flow.response is not None and not flow.response.stream:
            self._say_last(flow)

    def step(self) -> bool:
        """Closes what is idle. Whether there is anything to wait for: an answer that its client has not read yet, too,
        though its flow has ended and mitmproxy may have closed the connection."""
        waiting = bool(self._registry.flows) or self._unsent.total() > 0
        for client in list(self._registry.clients.values()):
            if not client.flows and client.conn.id not in self._closed:
                waiting = self._is_in_use(client) or waiting
        return waiting

    def _is_in_use(self, client: ClientState) -> bool:
        """Closes the connection if it is not."""
        silent = self._handlers.silent_for(client.conn)
        if relays(self._handlers.layer_of(client.conn)):
            return silent < QUIET
        if self._unsent.of(client.conn):
            return True
        if silent >= SETTLED and self._cut(client.conn):
            self._closed.add(client.conn.id)
            return False
        return True

    def _say_last(self, flow: http.HTTPFlow) -> None:
        response = flow.response
        if response is not None and response.status_code != 101 and flow.request.http_version.startswith("HTTP/1"):
            response.headers["Connection"] = "close"


def relays(top: layer.Layer | None, server: connection.Server | None = None) -> bool:
    """Whether a WebSocket or a raw tunnel (to `server`) is among the layers of a connection. The hooks do not tell: of
    a tunnel to a host in `ignore_hosts` there are none."""
    left = list(top.context.layers) if top is not None else []
    seen: set[int] = set()
    while left:
        found = left.pop()
        is_relay = isinstance(found, layers.TCPLayer | layers.WebsocketLayer)
        if is_relay and (server is None or found.context.server is server):
            return True
        if isinstance(found, layers.HttpLayer) and id(found) not in seen:
            seen.add(id(found))
            left += [below for stream in found.streams.values() for below in stream.context.layers]
    return False
