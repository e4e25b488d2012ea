"""Who has a place, by which address it counts, and who is told to go first."""

import time
from typing import Any

from mitmproxy.test import tflow

from megido_capture.limits.places import IDLE, Place, Places
from megido_capture.recording.state import ClientState, Registry


def client(address: str) -> Any:
    made = tflow.tclient_conn()
    made.peername = (address, 1234)
    return made


def seated(places: Places, registry: Registry, address: str, *, age: float) -> Place:
    """A client that connected `age` seconds ago and had its last request then."""
    conn = client(address)
    registry.clients[conn.id] = ClientState(conn)
    place = places.take(conn)
    place.connected = place.asked = time.monotonic() - age
    return place


def test_an_ipv6_client_counts_with_its_network() -> None:
    places = Places(Registry())
    taken = [places.take(client(f"2001:db8:0:1::{number:x}")) for number in range(1, 9)]
    places.take(client("2001:db8:0:2::1"))
    mapped = [places.take(client(address)) for address in ("192.0.2.7", "::ffff:192.0.2.7")]
    assert places.count(taken[0].address) == 8 and places.count(mapped[0].address) == 2 and len(places) == 11
    for place in taken:
        places.leave(place.conn)
        places.leave(place.conn)  # told to go, and then gone
    assert places.count(taken[0].address) == 0 and len(places) == 3


def test_the_order_is_by_the_last_request_and_holds_for_all_or_for_an_address() -> None:
    registry = Registry()
    places = Places(registry)
    old, older, young = [seated(places, registry, "192.0.2.1", age=age) for age in (3, 5, IDLE / 2)]
    other = seated(places, registry, "192.0.2.2", age=4)
    busy = seated(places, registry, "192.0.2.1", age=9)
    busy.busy = 1
    now = time.monotonic()
    assert list(places.least_used(now, asks=False, address="192.0.2.1")) == [older, old]
    assert list(places.least_used(now, asks=False)) == [older, other, old]
    assert young.asked > now - IDLE


def test_the_order_is_asked_again_of_whoever_is_taken_from_it() -> None:
    """It is kept for a while: who has a request or has gone meanwhile is passed over."""
    registry = Registry()
    places = Places(registry)
    gone, asking, idle, last = [seated(places, registry, "192.0.2.1", age=age) for age in (9, 8, 7, 6)]
    now = time.monotonic()
    first = next(places.least_used(now, asks=False))
    places.leave(gone.conn)
    asking.asked = now
    assert first is gone and list(places.least_used(now, asks=False)) == [idle, last]


def test_who_has_not_authenticated_goes_first_by_when_it_connected() -> None:
    registry = Registry()
    places = Places(registry)
    known, stranger, newer = [seated(places, registry, "192.0.2.1", age=age) for age in (9, 5, 3)]
    registry.clients[known.conn.id].authenticated = b"somebody"
    now = time.monotonic()
    stranger.asked = newer.asked = now  # refused just now
    assert list(places.least_used(now, asks=True)) == [stranger, newer, known]
