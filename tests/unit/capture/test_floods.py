"""Of a flood of errors few are told, of each address some, and none is forgotten while its address is remembered."""

from megido_capture.recording.floods import ADDRESS_BURST, ADDRESS_RATE, TOTAL_BURST, Flood


def test_an_address_has_a_burst_and_then_a_rate() -> None:
    flood = Flood(0.0)
    told = [flood.admit("192.0.2.1", 0.0) for _ in range(100)]
    assert told == [0] * int(ADDRESS_BURST) + [-1] * (100 - int(ADDRESS_BURST))
    assert flood.admit("192.0.2.2", 0.0) == 0, "another is heard still"
    assert flood.admit("192.0.2.1", 1 / ADDRESS_RATE) == 100 - ADDRESS_BURST, "and the next one says how many were not"
    assert flood.admit("192.0.2.1", 10.0) == 0


def test_an_ipv6_client_is_its_network() -> None:
    flood = Flood(0.0)
    told = [flood.admit(f"2001:db8::{number:x}", 0.0) for number in range(1, 100)]
    assert told.count(0) == ADDRESS_BURST


def test_many_addresses_are_bounded_together() -> None:
    flood = Flood(0.0)
    told = [flood.admit(f"10.0.{number // 256}.{number % 256}", 0.0) for number in range(5_000)]
    assert told.count(0) == TOTAL_BURST and len(flood._told) < 5_000
