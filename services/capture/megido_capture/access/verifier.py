"""Decides on credentials without holding up the event loop: argon2 in one thread, outcomes remembered, and guesses
throttled before anything is compared or hashed."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from megido_capture.access.buckets import Kept
from megido_capture.access.credentials import Accepted, Given, keyed
from megido_capture.access.line import Line, Ticket

REMEMBERED_WRONG = 4096

REMEMBERED_LET_IN = 4096
"""Pairs of address and credential that somebody was let in by."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`identity` of the accepted credential, or why not. `throttled`: nobody has looked at it, ask again later."""

    identity: bytes = b""
    reason: str = ""
    throttled: bool = False


THROTTLED = Outcome(reason="too many failed attempts", throttled=True)


class Verifier:
    def __init__(self, accepted: Accepted, clock: Callable[[], float] = time.monotonic) -> None:
        self._accepted = accepted
        self._line = Line(clock)
        self._right: dict[bytes, bytes] = {}
        """Memory key to identity. As many as there are secrets that are accepted: it needs no bound."""
        self._seen: set[bytes] = set()
        """Keyed hashes of the secrets behind them."""
        self._wrong: OrderedDict[bytes, None] = OrderedDict()
        """Memory keys. To say once more that they are wrong tells nobody anything."""
        self._let_in = Kept[bytes, tuple[str, bytes]](REMEMBERED_LET_IN)
        """Address and memory key to identity: whoever guesses there keeps none of them out."""
        self._tickets: dict[bytes, Ticket] = {}
        """By memory key, those that wait and the one that is hashed."""
        self._came = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def use(self, accepted: Accepted) -> None:
        """Decides by these from now on. What is remembered of right credentials stays as long as they are accepted."""
        self._accepted = accepted
        self._right = {key: identity for key, identity in self._right.items() if identity in accepted.identities}
        for pair in [pair for pair, identity in self._let_in.items() if identity not in accepted.identities]:
            del self._let_in[pair]
        self._wrong.clear()
        self._tickets.clear()
        self._line.clear()

    def is_still(self, given: Given, identity: bytes) -> bool:
        """Whether it is the credential that a connection was let in by. Tells nobody what he does not know: of any
        other one it says the same."""
        if given.problem:
            return False
        if self._accepted.compare(given) == identity:
            return True
        return self._right.get(self._accepted.memory_key(given)) == identity

    def at_once(self, given: Given, address: str) -> Outcome | None:
        """The outcome, when nothing has to be hashed for it. `address` is a `client_key`."""
        if given.problem:
            return Outcome(reason=given.problem)
        key = self._accepted.memory_key(given)
        if identity := self._let_in.asked_for((address, key)):
            return Outcome(identity)
        if key in self._wrong:
            return _wrong(given)
        return self._compare(given, address, key) if self._line.admits(address, key) else THROTTLED

    def is_secret(self, text: bytes) -> bool:
        """Whether `text` is a plain secret, or one that a hash was seen to be made of."""
        return self._accepted.holds(text) or keyed(text) in self._seen

    async def verify(self, given: Given, address: str) -> Outcome:
        """The outcome for what `at_once` does not know. Of equal credentials that come together one is hashed."""
        while True:
            accepted = self._accepted
            ticket = self._ticket(accepted, given, address)
            if ticket is None:
                return THROTTLED
            identity = await asyncio.shield(ticket.identity)
            if self._accepted is accepted:
                break
            if (outcome := self.at_once(given, address)) is not None:  # the configuration has changed meanwhile
                return outcome
        if identity is None:
            return THROTTLED
        if not identity:
            return _wrong(given)
        self._let_in.keep((address, ticket.key), identity)
        return Outcome(identity)

    def close(self) -> None:
        self._line.clear()
        if self._worker is not None:
            self._worker.cancel()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _compare(self, given: Given, address: str, key: bytes) -> Outcome | None:
        if identity := self._accepted.compare(given) or self._right.get(key, b""):
            self._let_in.keep((address, key), identity)
            return Outcome(identity)
        if self._accepted.needs_hashing(given):
            return None
        self._line.guessed(address)
        self._remember(key, b"")
        return _wrong(given)

    def _ticket(self, accepted: Accepted, given: Given, address: str) -> Ticket | None:
        key = accepted.memory_key(given)
        if (known := self._tickets.get(key)) is not None and not known.identity.done():
            self._line.join(known, address)
            return known
        ticket = Ticket(accepted, given, key)
        if not self._line.enter(ticket, address):
            return None
        self._tickets[key] = ticket
        ticket.identity.add_done_callback(lambda _: self._forget(ticket))
        self._came.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        return ticket

    def _forget(self, ticket: Ticket) -> None:
        if self._tickets.get(ticket.key) is ticket:
            del self._tickets[ticket.key]

    async def _work(self) -> None:
        while self._line:
            self._came.clear()
            ticket = self._line.next()
            if ticket is not None:
                await self._hash(ticket)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._line.pause()):
                    await self._came.wait()

    async def _hash(self, ticket: Ticket) -> None:
        """Whatever fails is raised to those who wait for the ticket."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="credentials")
        try:
            hashing = asyncio.get_running_loop().run_in_executor(self._thread, ticket.accepted.verify, ticket.given)
            identity = await hashing
        except asyncio.CancelledError:
            ticket.identity.set_result(None)
            raise
        except Exception as error:  # noqa: BLE001 - the next one is hashed all the same
            ticket.identity.set_exception(error)
            return
        if identity:
            self._line.settle(ticket)
            self._seen.add(keyed(ticket.given.secret))
        if self._accepted is ticket.accepted:
            self._remember(ticket.key, identity)
        ticket.identity.set_result(identity)

    def _remember(self, key: bytes, identity: bytes) -> None:
        if identity:
            self._right[key] = identity
            return
        self._wrong[key] = None
        if len(self._wrong) > REMEMBERED_WRONG:
            self._wrong.popitem(last=False)


def _wrong(given: Given) -> Outcome:
    return Outcome(reason="wrong password" if given.basic else "wrong token")
