"""Line 3: whoever guesses what needs no hash (plain secrets, remembered ones) gets as few answers as one whose guesses
are hashed.

A clock that stands still makes it exact: a bucket gets nothing back until the test says so."""

import asyncio
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import argon2
import pytest

from megido_capture.access.credentials import Accepted, Given
from megido_capture.access.line import ADDRESS_BURST, ADDRESS_RATE
from megido_shared.events import AuthAttempted
from tests.integration.capture.harness import flows, until
from tests.integration.capture.upstream import Upstream
from tests.security.test_s01_proxy_authentication import basic
from tests.support.inside import Inside, inside

pytestmark = pytest.mark.timeout(120)

CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
BURST = int(ADDRESS_BURST)
RIGHT = "Bearer right"
GUESSER, OTHER = "127.0.9.1", "127.0.9.2"


class Guarded:
    def __init__(self, proxy: Inside, upstream: Upstream) -> None:
        self.proxy = proxy
        self.url = f"http://127.0.0.1:{upstream.port}/plain"
        self.now = time.monotonic()
        self._numbers = itertools.count()

    @property
    def verifier(self) -> Any:
        return self.proxy.node.parts.access._verifier

    def stop_the_clock(self) -> None:
        self.verifier._line._clock = lambda: self.now

    @asynccontextmanager
    async def connected(self, address: str) -> AsyncIterator["Asking"]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port, local_addr=(address, 0))
        try:
            yield Asking(reader, writer, self.url)
        finally:
            writer.close()

    async def ask(self, address: str, header: str = "") -> int:
        """The status on a new connection."""
        async with self.connected(address) as asking:
            return await asking.ask(header)

    async def guess(self, address: str = GUESSER) -> int:
        """One that nobody has tried before."""
        return await self.ask(address, f"Bearer guess-{next(self._numbers)}")

    async def empty(self, address: str = GUESSER) -> None:
        assert [await self.guess(address) for _ in range(BURST + 1)] == [407] * BURST + [429]


class Asking:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, url: str) -> None:
        self._reader, self._writer, self._url = reader, writer, url

    async def ask(self, header: str = "") -> int:
        field = f"Proxy-Authorization: {header}\r\n" if header else ""
        self._writer.write(f"GET {self._url} HTTP/1.1\r\nHost: x\r\n{field}\r\n".encode())
        head = (await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 20)).lower()
        assert (b"retry-after: " in head) is (b" 429 " in head)
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        await asyncio.wait_for(self._reader.readexactly(int(length[1])), 20)
        return int(head.split(b" ")[1])


@asynccontextmanager
async def guarded(tmp_path: Path, upstream: Upstream, **settings: Any) -> AsyncIterator[Guarded]:
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, **(settings or {"auth_token": "right"}))
        found = Guarded(proxy, upstream)
        found.stop_the_clock()
        yield found


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """The secrets that were compared."""
    found: Counter[bytes] = Counter()
    compare = Accepted.compare

    def counting(accepted: Accepted, given: Given) -> bytes:
        found[given.secret] += 1
        return compare(accepted, given)

    monkeypatch.setattr(Accepted, "compare", counting)
    return found


async def test_a_guesser_at_full_speed_gets_few_looks_and_all_others_are_served(
    tmp_path: Path, upstream: Upstream, compared: Counter[bytes]
) -> None:
    async with guarded(tmp_path, upstream) as found:
        found.verifier._line._clock = time.monotonic
        assert await found.ask(GUESSER, RIGHT) == 200
        compared.clear()

        async def guessing() -> list[int]:
            return [await found.guess() for _ in range(80)]

        guessers = [asyncio.create_task(guessing()) for _ in range(10)]
        served = list[int]()
        while not all(guesser.done() for guesser in guessers):
            served += [await found.ask(address, RIGHT) for address in (GUESSER, OTHER)]
        answered = Counter(status for guesser in guessers for status in guesser.result())
        assert set(answered) == {407, 429} and answered.total() == 800
        del compared[b"right"]
        assert BURST <= compared.total() == answered[407] < 60
        assert len(served) > 2 and set(served) == {200}
        audit = await found.proxy.until(lambda events: _refused(events) >= 800)
        assert _refused(audit) == 800 == found.proxy.node.parts.counters["auth_refused"]


def _refused(events: list[Any]) -> int:
    return sum(event.attempts for event in flows(events, AuthAttempted) if not event.success)


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        ({"auth_token": "right"}, RIGHT),
        ({"auth_password": "right"}, basic("x", "right")),
        ({"auth_username": "anna", "auth_password": "right"}, basic("anna", "right")),
        ({"auth_token_hash": CHEAP.hash("right")}, RIGHT),
        ({"auth_token": "another", "auth_password_hash": CHEAP.hash("right")}, basic("x", "right")),
    ],
)
async def test_nothing_is_looked_at_while_the_bucket_is_empty(
    tmp_path: Path, upstream: Upstream, compared: Counter[bytes], settings: dict[str, Any], right: str
) -> None:
    async with guarded(tmp_path, upstream, **settings) as found:
        assert await found.ask(OTHER, right) == 200  # a hashed one is remembered from now on
        await found.empty()
        compared.clear()
        assert [await found.ask(GUESSER, right) for _ in range(3)] == [429] * 3
        assert not compared
        assert await found.ask("127.0.9.3", right) == 200


async def test_a_neighbour_of_the_guesser_has_his_chance_and_spends_nothing(tmp_path: Path, upstream: Upstream) -> None:
    async with guarded(tmp_path, upstream) as found:
        await found.empty()
        assert await found.ask(GUESSER, RIGHT) == 429
        found.now += 0.5 / ADDRESS_RATE
        assert await found.guess() == 429
        found.now += 0.5 / ADDRESS_RATE
        assert [await found.guess() for _ in range(20)] == [429] * 20  # the one is for whoever comes back
        assert await found.ask(GUESSER, RIGHT) == 200
        assert [await found.ask(GUESSER, f"Bearer guess-{number}") for number in (7, 8)] == [407, 429]  # there still
        assert await found.ask(GUESSER, RIGHT) == 200


async def test_a_neighbour_gets_in_while_somebody_guesses(tmp_path: Path, upstream: Upstream) -> None:
    async with guarded(tmp_path, upstream) as found:
        found.verifier._line._clock = time.monotonic
        seen: Counter[int] = Counter()

        async def guessing() -> None:
            while True:
                seen[await found.guess()] += 1

        guessers = [asyncio.create_task(guessing()) for _ in range(4)]
        await until(_now(lambda: seen[429]), bool)
        await until(lambda: found.ask(GUESSER, RIGHT), lambda status: status == 200)
        assert not any(guesser.done() for guesser in guessers)
        for guesser in guessers:
            guesser.cancel()
        await asyncio.gather(*guessers, return_exceptions=True)


def _now(value: Any) -> Any:
    async def read() -> Any:
        return value()

    return read


async def test_after_a_pause_somebody_new_need_not_come_twice(tmp_path: Path, upstream: Upstream) -> None:
    async with guarded(tmp_path, upstream) as found:
        await found.empty()
        found.now += 1 / ADDRESS_RATE
        assert await found.ask(GUESSER, RIGHT) == 200


async def test_who_was_let_in_stays_known_as_long_as_that_credential_is_accepted(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with guarded(tmp_path, upstream) as found:
        assert await found.ask(GUESSER, RIGHT) == 200
        await found.empty()
        found.proxy.apply(auth_password="another")
        assert await found.ask(GUESSER, RIGHT) == 200
        assert await found.ask(GUESSER, basic("x", "another")) == 429
        assert await found.ask(GUESSER, basic("x", "right")) == 429  # shown in another way: not seen there before
        found.proxy.apply(auth_token="new")
        assert [await found.ask(GUESSER, f"Bearer {token}") for token in ("new", "right")] == [429, 429]
        found.proxy.apply(auth_token="right")
        assert await found.ask(GUESSER, RIGHT) == 429


async def test_busy_clients_with_the_right_token_are_never_turned_away(tmp_path: Path, upstream: Upstream) -> None:
    async with guarded(tmp_path, upstream) as found:
        for _ in range(20):
            assert set(await asyncio.gather(*(found.ask(GUESSER, RIGHT) for _ in range(20)))) == {200}
        await found.empty()  # they left all of it


async def test_what_cannot_be_looked_at_is_no_guess(tmp_path: Path, upstream: Upstream) -> None:
    async with guarded(tmp_path, upstream) as found:
        for header in ("", "Basic ====", "Bearer", "Digest x"):
            assert {await found.ask(GUESSER, header) for _ in range(2 * BURST)} == {407}
        await found.empty()
        assert await found.ask(GUESSER) == 407  # a browser asks without them first


async def test_the_same_wrong_one_again_costs_nothing(tmp_path: Path, upstream: Upstream) -> None:
    async with guarded(tmp_path, upstream) as found:
        assert {await found.ask(GUESSER, "Bearer out-of-date") for _ in range(4 * BURST)} == {407}
        assert await found.ask(GUESSER, RIGHT) == 200


async def test_compared_and_hashed_guesses_draw_on_one_bucket(tmp_path: Path, upstream: Upstream) -> None:
    settings = {"auth_token": "right", "auth_password_hash": CHEAP.hash("password")}
    async with guarded(tmp_path, upstream, **settings) as found:
        headers = [f"Bearer {number}" if number % 2 else basic("x", str(number)) for number in range(BURST + 2)]
        answered = [await found.ask(GUESSER, header) for header in headers]
        assert answered == [407] * BURST + [429] * 2


async def test_an_open_connection_goes_on_with_its_own_credential_and_tries_no_other(
    tmp_path: Path, upstream: Upstream
) -> None:
    for number, settings in enumerate(({"auth_token": "right"}, {"auth_token_hash": CHEAP.hash("right")})):
        async with (
            guarded(tmp_path / str(number), upstream, auth_password="weak", **settings) as found,
            found.connected(GUESSER) as asking,
        ):
            assert await asking.ask(RIGHT) == 200
            await found.empty()
            found.verifier._let_in.clear()  # as after very many others
            assert await found.ask(GUESSER, RIGHT) == 429
            assert await asking.ask(RIGHT) == 200
            assert [await asking.ask(basic("x", guess)) for guess in ("weak", "week")] == [429, 429]
            assert [await asking.ask(RIGHT), await asking.ask()] == [200, 200]
