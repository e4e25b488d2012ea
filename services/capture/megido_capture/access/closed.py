"""The addon that serves nobody while it is not known who may be served."""

from collections.abc import Callable

from mitmproxy import connection

from megido_capture.counters import Counters
from megido_capture.recording.state import Registry


class Closed:
    name = "megido-closed-gate"

    def __init__(
        self,
        closed: Callable[[], str],
        registry: Registry,
        counters: Counters,
        *,
        cut: Callable[[connection.Client], bool],
    ) -> None:
        """`closed` answers why nobody is served, "" when clients are. `cut` ends a client's connection."""
        self._closed = closed
        self._registry = registry
        self._counters = counters
        self._cut = cut
        self._ended: set[str] = set()

    def client_connected(self, client: connection.Client) -> None:
        if reason := self._closed():
            client.error = reason
            self._counters["gate_refused"] += 1

    def tick(self, _: float) -> None:
        """Called a few times a second: who was served before is served no more."""
        if self._closed():
            for state in list(self._registry.clients.values()):
                if state.conn.id not in self._ended and self._cut(state.conn):
                    self._ended.add(state.conn.id)
                    self._counters["gate_refused"] += 1

    def client_disconnected(self, client: connection.Client) -> None:
        self._ended.discard(client.id)
