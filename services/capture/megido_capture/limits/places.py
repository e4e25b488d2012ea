"""The clients that are served. Each has a place, which it gives to a new one when it makes no use of it."""

import time
from collections.abc import Iterable, Iterator
from enum import Enum

from mitmproxy import connection, tls

from megido_capture.access.addresses import client_key
from megido_capture.access.gate import SELF_AUTHENTICATED
from megido_capture.recording.state import Registry

IDLE = 1.0
"""Seconds without a request after which a client gives its place to a new one."""

RANKED_FOR = 0.1
"""Seconds for which an order of the clients that may go holds. A flood of new ones must not have all of the others
looked through for each."""

type Rank = tuple[bool, float]
"""Whether a client is known, and since when it has no request: the smallest goes first."""


class Step(Enum):
    """What a client has to do within `header_timeout`."""

    REQUEST = "begin its first request"
    TUNNEL = "send the first bytes into its tunnel"
    HANDSHAKE = "finish its TLS handshake"
    HEAD = "finish the head of its request"
    H2_FRAME = "finish its HTTP/2 frame"
    H2_HEAD = "finish the head of its HTTP/2 request"


FIRST = (Step.REQUEST, Step.TUNNEL)
"""While one of these runs the server may be connected to already: it does not begin before that is done."""


class Place:
    """One client, from the moment that it is let in until it has gone or is told to go."""

    __slots__ = ("address", "asked", "busy", "conn", "connected", "hello", "since", "step")

    def __init__(self, conn: connection.Client) -> None:
        self.conn = conn
        self.address = client_key(conn.peername[0])
        self.connected = self.asked = self.since = time.monotonic()
        """When it connected; when it last had a request (it begins, or is seen to be open); when its step began."""
        self.step: Step | None = None
        self.busy = 0
        """WebSockets, raw tunnels, and connections that are being opened for it."""
        self.hello: tls.ClientHelloData | None = None
        """Of a client that speaks TLS: it says whether that passes through, of which no hook tells."""

    def begin(self, step: Step, now: float) -> None:
        self.step, self.since = step, now

    def is_late(self, now: float, limit: float) -> bool:
        connecting = self.busy > 0 and self.step in FIRST
        return self.step is not None and not connecting and now - self.since > limit

    @property
    def in_use(self) -> bool:
        return self.busy > 0 or (self.hello is not None and self.hello.ignore_connection)


class Places:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._taken: dict[str, Place] = {}
        self._by_address: dict[str, dict[str, Place]] = {}
        self._order: list[tuple[Rank, Place]] = []
        self._ordered = -RANKED_FOR
        self.get = self._taken.get
        """The place of a client, by its id; None when it has none (any more)."""

    def __len__(self) -> int:
        return len(self._taken)

    def __iter__(self) -> Iterator[Place]:
        return iter(self._taken.values())

    def count(self, address: str) -> int:
        """Places of an address, as `client_key` names it."""
        return len(self._by_address.get(address, ()))

    def take(self, conn: connection.Client) -> Place:
        place = self._taken[conn.id] = Place(conn)
        self._by_address.setdefault(place.address, {})[conn.id] = place
        return place

    def leave(self, conn: connection.Client) -> None:
        place = self._taken.pop(conn.id, None)
        if place is not None:
            mine = self._by_address[place.address]
            del mine[conn.id]
            if not mine:
                del self._by_address[place.address]

    def see_open_flows(self, now: float) -> None:
        """To be called often: a client's time without a request begins when it was last seen with one. So no request
        has to tell of its end."""
        for state in self._registry.flows.values():
            place = self._taken.get(state.client.conn.id)
            if place is not None:
                place.asked = now

    def least_used(self, now: float, *, asks: bool, address: str = "") -> Iterator[Place]:
        """Those who may be told to go, who goes first first: where credentials are asked for (`asks`) those without,
        by when they connected; then who has had no request for longest. What a client sends beside requests counts for
        nothing: a byte now and then costs it as little as none. With `address` only places of that."""
        if address:
            yield from (place for _, place in reversed(self._ranked(self._by_address[address].values(), now, asks)))
            return
        if now - self._ordered >= RANKED_FOR:
            self._order, self._ordered = self._ranked(self._taken.values(), now, asks), now
        while self._order:
            rank, place = self._order.pop()
            if self._taken.get(place.conn.id) is place and self._rank(place, now, asks) == rank:
                yield place

    def _ranked(self, places: Iterable[Place], now: float, asks: bool) -> list[tuple[Rank, Place]]:
        found = [(rank, place) for place in places if (rank := self._rank(place, now, asks)) is not None]
        found.sort(key=lambda ranked: ranked[0], reverse=True)
        return found

    def _rank(self, place: Place, now: float, asks: bool) -> Rank | None:
        """None: it keeps its place."""
        state = self._registry.clients.get(place.conn.id)
        if state is None or state.flows or place.in_use:
            return None
        known = not asks or bool(state.authenticated) or isinstance(place.conn.proxy_mode, SELF_AUTHENTICATED)
        since = place.asked if known else place.connected
        return (known, since) if now - since >= IDLE else None
