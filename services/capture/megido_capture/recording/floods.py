"""How often an address is heard about errors that need neither a request nor a credential. A record is larger than the
bytes that make one: without a bound a few addresses fill the journal."""

from megido_capture.access.addresses import client_key
from megido_capture.access.buckets import Bucket, Kept

ADDRESS_BURST, ADDRESS_RATE = 20.0, 5.0
TOTAL_BURST, TOTAL_RATE = 200.0, 50.0
"""Errors that are told at once, and a second after that: of one address, and of all. Addresses are cheap."""

REMEMBERED_ADDRESSES = 4096


class _Told:
    __slots__ = ("bucket", "left_out")

    def __init__(self, now: float) -> None:
        self.bucket = Bucket(ADDRESS_BURST, ADDRESS_RATE, now)
        self.left_out = 0


class Flood:
    """`now` is `time.monotonic()`."""

    def __init__(self, now: float) -> None:
        self._total = Bucket(TOTAL_BURST, TOTAL_RATE, now)
        self._told = Kept[_Told](REMEMBERED_ADDRESSES)

    def admit(self, host: str, now: float) -> int:
        """How many of its address were left out since one was told; -1: this one is left out too."""
        address = client_key(host)
        told = self._told.asked_for(address) or self._told.keep(address, _Told(now))
        if told.bucket.fill(now) < 1 or not self._total.take(now):
            told.left_out += 1
            return -1
        told.bucket.take(now)
        left_out, told.left_out = told.left_out, 0
        return left_out
