"""Decides on credentials without holding up the event loop: argon2 in one thread, outcomes remembered, and guesses
throttled before anything is hashed."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megido_capture.access.credentials import Accepted, Given, keyed

MAX_WAITING = 16
"""Credentials that wait for the thread, each for a few hundred milliseconds of hashing."""

REMEMBERED_WRONG = 4096
REMEMBERED_ADDRESSES = 4096

ADDRESS_BURST, ADDRESS_RATE = 5.0, 0.5
TOTAL_BURST, TOTAL_RATE = 10.0, 1.0
"""Wrong guesses that are hashed at once, and a second after that: of one address, and in total (about a third of a
core). The same wrong guess again costs nothing, and the right one is given back."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`identity` of the accepted credential, or why not. `throttled`: nobody has looked at it, ask again later."""

    identity: bytes = b""
    reason: str = ""
    throttled: bool = False


class _Bucket:
    __slots__ = ("burst", "filled", "level", "rate")

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self.burst, self.rate = burst, rate
        self.level, self.filled = burst, now

    def fill(self, now: float) -> float:
        self.level = min(self.burst, self.level + (now - self.filled) * self.rate)
        self.filled = now
        return self.level


class Throttle:
    """Token buckets, one for each address of the last few thousand and one for all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = _Bucket(TOTAL_BURST, TOTAL_RATE, clock())
        self._addresses: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, address: str) -> bool:
        """Whether this address may guess now."""
        now = self._clock()
        bucket = self._addresses.get(address)
        if bucket is None:
            bucket = self._addresses[address] = _Bucket(ADDRESS_BURST, ADDRESS_RATE, now)
            if len(self._addresses) > REMEMBERED_ADDRESSES:
                self._addresses.popitem(last=False)
        self._addresses.move_to_end(address)
        if bucket.fill(now) < 1 or self._total.fill(now) < 1:
            return False
        bucket.level -= 1
        self._total.level -= 1
        return True

    def give_back(self, address: str) -> None:
        """It was no guess."""
        for bucket in (self._addresses.get(address), self._total):
            if bucket is not None:
                bucket.level = min(bucket.burst, bucket.level + 1)


class Verifier:
    def __init__(self, accepted: Accepted, clock: Callable[[], float] = time.monotonic) -> None:
        self._accepted = accepted
        self._throttle = Throttle(clock)
        self._right: dict[bytes, bytes] = {}
        """Memory key to identity. As many as there are secrets that are accepted: it needs no bound."""
        self._seen: set[bytes] = set()
        """Keyed hashes of the secrets behind them."""
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def use(self, accepted: Accepted) -> None:
        """Decides by these from now on. What is remembered of right credentials stays as long as they are accepted."""
        self._accepted = accepted
        self._right = {key: identity for key, identity in self._right.items() if identity in accepted.identities}
        self._wrong.clear()
        self._waiting.clear()

    def at_once(self, given: Given) -> Outcome | None:
        """The outcome, when nothing has to be hashed for it."""
        if given.problem:
            return Outcome(reason=given.problem)
        if identity := self._accepted.compare(given):
            return Outcome(identity)
        wrong = Outcome(reason="wrong password" if given.basic else "wrong token")
        if not self._accepted.needs_hashing(given):
            return wrong
        key = self._accepted.memory_key(given)
        if identity := self._right.get(key, b""):
            return Outcome(identity)
        return wrong if key in self._wrong else None

    def is_secret(self, text: bytes) -> bool:
        """Whether `text` is a plain secret, or one that a hash was seen to be made of."""
        return self._accepted.holds(text) or keyed(text) in self._seen

    async def verify(self, given: Given, address: str) -> Outcome:
        """The outcome for what `at_once` does not know. Of equal credentials that come together one is hashed."""
        accepted = self._accepted
        key = accepted.memory_key(given)
        waiting = self._waiting.get(key)
        if waiting is None:
            if len(self._waiting) >= MAX_WAITING or not self._throttle.take(address):
                return Outcome(reason="too many failed attempts", throttled=True)
            waiting = self._waiting[key] = asyncio.ensure_future(self._hash(accepted, given, key, address))
        await asyncio.shield(waiting)
        if self._accepted is accepted:
            identity = waiting.result()
        else:  # the configuration has changed meanwhile
            return self.at_once(given) or Outcome(reason="the accepted credentials changed", throttled=True)
        return Outcome(identity) if identity else Outcome(reason="wrong password" if given.basic else "wrong token")

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _hash(self, accepted: Accepted, given: Given, key: bytes, address: str) -> bytes:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="credentials")
        try:
            identity = await asyncio.get_running_loop().run_in_executor(self._thread, accepted.verify, given)
        finally:
            if self._accepted is accepted:
                self._waiting.pop(key, None)
        if identity:
            self._throttle.give_back(address)
            self._seen.add(keyed(given.secret))
        if self._accepted is accepted:
            self._remember(key, identity)
        return identity

    def _remember(self, key: bytes, identity: bytes) -> None:
        if identity:
            self._right[key] = identity
            return
        self._wrong[key] = None
        if len(self._wrong) > REMEMBERED_WRONG:
            self._wrong.popitem(last=False)
