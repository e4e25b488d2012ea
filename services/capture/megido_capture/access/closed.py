"""The addon that serves nobody while it is not known who may be served."""

from collections.abc import Callable

from mitmproxy import connection

from megido_capture.counters import Counters


class Closed:
    name = "megido-closed-gate"

    def __init__(self, closed: Callable[[], str], counters: Counters) -> None:
        """`closed` answers why nobody is served, "" when clients are."""
        self._closed = closed
        self._counters = counters

    def client_connected(self, client: connection.Client) -> None:
        if reason := self._closed():
            client.error = reason
            self._counters["gate_refused"] += 1
