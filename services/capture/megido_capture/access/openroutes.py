"""The upstream connections that are open, and their end when where they lead is blocked."""

from collections.abc import Callable, Iterable

from mitmproxy import connection

from megido_capture.counters import Counters
from megido_capture.recording.errors import Cause, cause_of_message
from megido_capture.recording.state import FlowState, Registry

type Place = tuple[str, int]
"""Host in its plain form, and port."""

type Judge[T] = Callable[[connection.Client, T], str]
"""Why a client may not reach something; "" when it may."""


class OpenRoutes:
    """Ends both sides: the upstream's connection, and then the client's, unless that is in use for another upstream.

    What was under way on it is recorded once, with the reason: a flow as failed (the client gets 502 while it has no
    answer yet), a WebSocket or tunnel as an error without a flow. Idle connections are closed and only counted.
    """

    def __init__(
        self,
        registry: Registry,
        counters: Counters,
        *,
        note: Callable[[connection.Client, connection.Server, Cause], None],
        relays: Callable[[connection.Client, connection.Server | None], bool],
        cut_server: Callable[[connection.Client, connection.Server], bool],
        cut_client: Callable[[connection.Client], bool],
    ) -> None:
        """`note` remembers why an attempt failed, for the error that the client's end brings. `relays` answers whether
        a WebSocket or tunnel leads to a server, or to any."""
        self._registry = registry
        self._counters = counters
        self._note = note
        self._relays = relays
        self._cut_server = cut_server
        self._cut_client = cut_client
        self._open: dict[str, tuple[connection.Client, connection.Server]] = {}
        self._chained: dict[str, tuple[connection.Client, Place]] = {}
        """Of clients in mode upstream: where the proxy behind was last asked to lead."""
        self._ending: set[str] = set()

    def opened(self, client: connection.Client, server: connection.Server) -> None:
        self._open[server.id] = (client, server)

    def chained(self, client: connection.Client, place: Place) -> None:
        self._chained[client.id] = (client, place)

    def server_gone(self, client: connection.Client, server: connection.Server) -> None:
        """By now mitmproxy has told the client, where it could."""
        self._open.pop(server.id, None)
        if server.id in self._ending:
            self._ending.discard(server.id)
            elsewhere = [state for state in self._flows(client) if state.flow.server_conn.id != server.id]
            if not elsewhere:
                self._cut_client(client)

    def client_gone(self, client: connection.Client) -> None:
        self._chained.pop(client.id, None)

    def end(self, leads: Judge[connection.Server], named: Judge[Place]) -> None:
        """Ends every connection of which `leads`, or behind another proxy `named`, gives a reason."""
        for client, server in list(self._open.values()):
            if why := leads(client, server):
                flows = [state for state in self._flows(client) if state.flow.server_conn.id == server.id]
                self._tell(client, server, flows, why, relays=self._relays(client, server))
                self._ending.add(server.id)
                if not self._cut_server(client, server):
                    self.server_gone(client, server)
        for client, place in list(self._chained.values()):
            if why := named(client, place):
                behind = connection.Server(address=place)
                self._tell(client, behind, self._flows(client), why, relays=self._relays(client, None))
                self._cut_client(client)

    def _tell(
        self,
        client: connection.Client,
        server: connection.Server,
        flows: Iterable[FlowState],
        why: str,
        *,
        relays: bool,
    ) -> None:
        self._counters["cut_destinations"] += 1
        cause = cause_of_message(why)
        told = False
        for state in flows:
            state.cut, told = state.cut or cause, True
        if relays and not told:
            self._note(client, server, cause)

    def _flows(self, client: connection.Client) -> list[FlowState]:
        return list(self._registry.client(client).flows.values())
