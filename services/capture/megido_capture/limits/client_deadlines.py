"""The addon that bounds how long a client may take for its next step inside TLS: its hello, the handshake, and its
first request. Heads in plain HTTP, and heads that come in pieces, are for `limits`."""

import time
from collections.abc import Callable

from mitmproxy import connection, http, tcp, tls
from mitmproxy.proxy import layer
from mitmproxy.proxy.layers import ClientTLSLayer, ServerTLSLayer

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_capture.recording.connections import Connections

HANDSHAKE, REQUEST = "TLS handshake", "first request"


class ClientTimeouts:
    """Each step has `header_timeout`. The clock stands still while the server is connected to, which has a deadline of
    its own. A handshake that is not finished is an error; a connection without a request is only closed, as an idle
    one is: browsers open some for later and open others when they need them."""

    name = "megido-client-timeouts"

    def __init__(
        self,
        settings: CaptureSettings,
        connections: Connections,
        counters: Counters,
        *,
        time_out: Callable[[connection.Client], None],
    ) -> None:
        self.settings = settings
        self.counters = counters
        self._connections = connections
        self._time_out = time_out
        self._waiting: dict[str, tuple[connection.Client, str, float]] = {}

    @contained
    def next_layer(self, data: layer.NextLayer) -> None:
        """Behind mitmproxy's own addon: its choice says that TLS has begun."""
        if isinstance(data.layer, ServerTLSLayer | ClientTLSLayer):
            self._begin(data.context.client, HANDSHAKE)

    @contained
    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        self._end(data.context.client)

    @contained
    def tls_start_client(self, data: tls.TlsData) -> None:
        self._begin(data.context.client, HANDSHAKE)

    @contained
    def tls_established_client(self, data: tls.TlsData) -> None:
        self._begin(data.context.client, REQUEST)

    @contained
    def tls_failed_client(self, data: tls.TlsData) -> None:
        self._end(data.context.client)

    @contained
    def http_connect(self, flow: http.HTTPFlow) -> None:
        self._end(flow.client_conn)

    @contained
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        self._end(flow.client_conn)

    @contained
    def tcp_start(self, flow: tcp.TCPFlow) -> None:
        self._end(flow.client_conn)

    @contained
    def client_disconnected(self, client: connection.Client) -> None:
        self._end(client)

    def tick(self, now: float) -> None:
        limit = self.settings.header_timeout
        for client, step, began in list(self._waiting.values()) if limit else ():
            if now - began <= limit:
                continue
            del self._waiting[client.id]
            if step is HANDSHAKE:
                message = f"timed out: the client did not finish its TLS handshake within {limit} seconds"
                self._connections.client_timed_out(client, f"{message} (header_timeout)")
            self._time_out(client)

    def _begin(self, client: connection.Client, step: str) -> None:
        self._waiting[client.id] = (client, step, time.monotonic())

    def _end(self, client: connection.Client) -> None:
        if self._waiting:
            self._waiting.pop(client.id, None)
