"""Reads what mitmproxy holds of its open connections and tells nobody: parts of bodies, resets, crashes."""

import asyncio
import logging
from collections.abc import Callable, Iterator

from mitmproxy import connection, http
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.proxy.layer import Layer
from mitmproxy.proxy.layers.http import HttpLayer, HttpStream
from mitmproxy.proxy.layers.http._events import RequestData
from mitmproxy.proxy.server import ConnectionHandler

CRASHED = "mitmproxy has crashed!"
"""What a connection handler logs when a layer raised; it then goes on, and the connection hangs."""


class OpenConnections:
    """The open connections of a proxy. What is asked about others, as flows that are played back, has no answer."""

    def __init__(self, proxyserver: Proxyserver) -> None:
        self._proxyserver = proxyserver

    def arrived(self, flow: http.HTTPFlow) -> tuple[bytes, bytes]:
        """The parts of request and response body that mitmproxy has of a flow which is not at its end: it collects a
        body that is read whole, and one that is to be streamed waits while the server is connected to. Empty where
        nothing has come, where it went on already, and once the body is the flow's own (`content`)."""
        handler = self._handler(flow)
        stream = _stream_of(handler, flow) if handler else None
        if stream is None:
            return b"", b""
        request = b"" if flow.request.stream else bytes(stream.request_body_buf)
        response = b"" if flow.response and flow.response.stream else bytes(stream.response_body_buf)
        waiting = (event.data for event in stream._paused_event_queue if isinstance(event, RequestData))
        return request + b"".join(waiting), response

    def was_reset(self, flow: http.HTTPFlow) -> bool:
        """Whether the server's connection of a flow ended by a reset; mitmproxy makes no difference."""
        handler = self._handler(flow)
        transport = handler.transports.get(flow.server_conn) if handler else None
        reader = transport.reader if transport else None
        return isinstance(reader, asyncio.StreamReader) and isinstance(reader.exception(), ConnectionError)

    def _handler(self, flow: http.HTTPFlow) -> ConnectionHandler | None:
        return self._proxyserver.connections.get(flow.client_conn.id)

    def of_client(self, address: tuple[str, int]) -> Iterator[ConnectionHandler]:
        for handler in list(self._proxyserver.connections.values()):
            if handler.client.peername == address:
                yield handler


class CrashWatch(logging.Handler):
    """Sees layers crash in mitmproxy's log, which is the only place that tells: `crashed` is told, and the connection
    closed, which would hang."""

    def __init__(self, connected: OpenConnections, crashed: Callable[[connection.Client, BaseException], None]) -> None:
        super().__init__(logging.ERROR)
        self._connected = connected
        self._crashed = crashed
        self._logger = logging.getLogger("mitmproxy.proxy.server")
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg != CRASHED or not record.exc_info or record.exc_info[1] is None:
            return
        for handler in self._connected.of_client(getattr(record, "client", ("", 0))):
            self._crashed(handler.client, record.exc_info[1])
            transport = handler.transports.get(handler.client)
            if transport is not None and transport.handler is not None:
                transport.handler.cancel("crashed")

    def stop(self) -> None:
        self._logger.removeHandler(self)


def _stream_of(handler: ConnectionHandler, flow: http.HTTPFlow) -> HttpStream | None:
    """A context lists the layers of a connection. An exchange has a context of its own, which begins with the layers
    that it came through, and goes on where it became a tunnel."""
    todo: list[Layer] = list(handler.layer.context.layers)
    seen: set[int] = set()
    while todo:
        layer = todo.pop()
        if isinstance(layer, HttpLayer) and id(layer) not in seen:
            seen.add(id(layer))
            for stream in layer.streams.values():
                if getattr(stream, "flow", None) is flow:
                    return stream
                todo.extend(stream.context.layers)
    return None
