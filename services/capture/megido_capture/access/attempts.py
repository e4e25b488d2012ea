"""Attempts to use the proxy as audit events. Of a flood of refusals the first are written one by one, before the client
learns of them, and the rest as sums, a second late at most: each attempt is in exactly one event's `attempts`."""

import time
from collections.abc import Callable

from megido_capture.access.addresses import client_key
from megido_capture.access.buckets import Bucket, Kept
from megido_capture.recording.emitter import Emitter
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.events import NO_PEER, AuthAttempted, Peer

ADDRESS_BURST, ADDRESS_RATE = 5.0, 2.0
TOTAL_BURST, TOTAL_RATE = 100.0, 20.0
"""Refusals that are written one by one at once, and a second after that: of one address, and of all. Addresses are
cheap (an IPv6 client has any number), and each would have a burst of its own."""

REMEMBERED_ADDRESSES = 4096

MAX_SUMS = 128
"""Pairs of address and reason that are summed at a time, each an event when its second is over."""

EVERY = 1.0
"""Seconds that attempts are summed for."""

OTHERS = "refused, from further addresses"


class _Sum:
    __slots__ = ("attempts", "client", "username")

    def __init__(self, client: Peer, username: str) -> None:
        self.client, self.username = client, username
        self.attempts = 0

    def add(self, username: str) -> None:
        self.attempts += 1
        if username != self.username:
            self.username = ""  # one of them would stand for all


class Attempts:
    """Made once a node: its limits are on all that ask, whoever refuses them. `tick` is to be called a few times a
    second, `close` when the node stops; what comes after that is written one by one."""

    def __init__(self, emitter: Emitter, clock: Clock, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._emitter = emitter
        self._clock = clock
        self._monotonic = monotonic
        self._total = Bucket(TOTAL_BURST, TOTAL_RATE, monotonic())
        self._buckets = Kept[Bucket](REMEMBERED_ADDRESSES)
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._others = _Sum(NO_PEER, "")
        self._since = 0.0
        self._closed = False

    def accepted(self, client: Peer, username: str) -> None:
        self._write(client, username, "")

    def refused(self, client: Peer, username: str, reason: str) -> None:
        now, address = self._monotonic(), client_key(client.ip)
        if self._closed or self._at_once(address, now):
            self._write(client, username, reason)
            return
        if not (self._sums or self._others.attempts):
            self._since = now
        found = self._sums.get((address, reason))
        if found is None and len(self._sums) < MAX_SUMS:
            found = self._sums[address, reason] = _Sum(Peer(ip=client.ip), username)
        (found or self._others).add(username)

    def tick(self, now: float) -> None:
        """Writes the sums when their second is over. `now` is on `monotonic`."""
        if now - self._since >= EVERY:
            self.flush()

    def flush(self) -> None:
        sums, self._sums = self._sums, {}
        for (_, reason), found in sums.items():
            self._write(found.client, found.username, reason, found.attempts)
        others, self._others = self._others, _Sum(NO_PEER, "")
        if others.attempts:
            self._write(others.client, others.username, OTHERS, others.attempts)

    def close(self) -> None:
        self._closed = True
        self.flush()

    def _at_once(self, address: str, now: float) -> bool:
        bucket = self._buckets.asked_for(address)
        if bucket is None:
            bucket = self._buckets.keep(address, Bucket(ADDRESS_BURST, ADDRESS_RATE, now))
        if bucket.fill(now) < 1 or not self._total.take(now):
            return False
        return bucket.take(now)

    def _write(self, client: Peer, username: str, reason: str, attempts: int = 1) -> None:
        self._emitter.write(
            AuthAttempted(
                **self._emitter.terminal(self._clock.time_us()),
                auth_id=ids.new_id(),
                success=not reason,
                username=username,
                failure_reason=reason,
                client=client,
                attempts=attempts,
            )
        )
