"""What mitmproxy's handlers of connections know and can do, and no hook tells or asks for."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from mitmproxy import connection
from mitmproxy.proxy import events, layer
from mitmproxy.proxy.server import ConnectionIO


class Handlers:
    """`connections` are mitmproxy's handlers by the id of their client."""

    def __init__(self, connections: Mapping[Any, Any]) -> None:
        self._connections = connections
        self._telling: set[asyncio.Task[None]] = set()

    def transport(self, client: connection.Client) -> ConnectionIO | None:
        return self.of_connection(client, client)

    def of_connection(self, client: connection.Client, conn: connection.Connection) -> ConnectionIO | None:
        """The transport of one of the connections that a client's handler has."""
        handler = self._connections.get(client.id)
        found: ConnectionIO | None = handler.transports.get(conn) if handler else None
        return found

    def layer_of(self, client: connection.Client) -> layer.Layer | None:
        handler = self._connections.get(client.id)
        found: layer.Layer | None = handler.layer if handler else None
        return found

    def silent_for(self, client: connection.Client) -> float:
        """Seconds since anything came from the client or from its upstreams."""
        handler = self._connections.get(client.id)
        return time.time() - handler.timeout_watchdog.last_activity if handler else 0.0

    def cut_server(self, client: connection.Client, server: connection.Server) -> bool:
        """Ends an upstream connection through its handler's task: mitmproxy has no call for it. False when there is
        none."""
        handler = self._connections.get(client.id)
        transport = self.of_connection(client, server)
        if handler is None or transport is None or transport.handler is None:
            return False
        if server.timestamp_tcp_setup is not None and not server.state & connection.ConnectionState.CAN_READ:
            # Closed by the peer already: that was told once, to a layer that was not listening yet.
            told = asyncio.ensure_future(handler.server_event(events.ConnectionClosed(server)))
            self._telling.add(told)
            told.add_done_callback(self._telling.discard)
        return bool(transport.handler.cancel("timeout"))

    def abort_server(self, client: connection.Client, server: connection.Server) -> None:
        """Ends a connection that has just been made. What mitmproxy writes to it from now on goes nowhere."""
        transport = self.of_connection(client, server)
        if transport is None or transport.writer is None:
            return
        if isinstance(transport.writer, asyncio.StreamWriter):
            transport.writer.transport.abort()
        else:
            transport.writer.close()  # type: ignore[no-untyped-call]

    def close_with(self, client: connection.Client, data: bytes) -> None:
        """Writes to a client past mitmproxy's layers, which would wait for the rest of its request first."""
        transport = self.transport(client)
        if client.tls or transport is None or transport.writer is None:
            return
        transport.writer.write(data)
