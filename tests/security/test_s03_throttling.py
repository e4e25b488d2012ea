"""Line 3: comparisons take the same time, unknown users cost a hash too, and guesses are throttled before they do.

Of guesses that need no hash: test_s03_guessing.py."""

import asyncio
import hmac
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import argon2
import pytest

from megido_capture.access.credentials import Accepted, Given, parse
from megido_capture.access.line import ADDRESS_BURST, MAX_WAITING
from megido_capture.access.verifier import Verifier
from megido_capture.configuration.settings import CaptureSettings
from megido_shared.events import AuthAttempted
from tests.integration.capture.harness import curl, flows, until
from tests.integration.capture.upstream import Upstream
from tests.security.test_s01_proxy_authentication import basic
from tests.support.inside import inside

pytestmark = pytest.mark.timeout(120)

FULL = argon2.PasswordHasher()
CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
GUESSES = 1000


class Hashing:
    """Counts what is hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        verify = Accepted.verify

        def counting(accepted: Accepted, given: Given) -> bytes:
            self.count += 1
            return verify(accepted, given)

        monkeypatch.setattr(Accepted, "verify", counting)


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> Hashing:
    return Hashing(monkeypatch)


async def guess(port: int, number: int, line: str = "CONNECT example.org:443", address: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Bearer guess-{number}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return head.split(b" ")[1]


async def so(condition: Callable[[], bool]) -> None:
    async def read() -> bool:
        return condition()

    await until(read, bool)


def audited(found: list[Any]) -> int:
    return sum(attempt.attempts for attempt in flows(found, AuthAttempted) if not attempt.success)


async def test_a_thousand_bad_logins_leave_normal_traffic_alone(
    tmp_path: Path, upstream: Upstream, hashing: Hashing
) -> None:
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=FULL.hash("right"))
        good = ("-H", "Proxy-Authorization: Bearer right")
        url = f"http://127.0.0.1:{upstream.port}/plain"
        assert (await curl(proxy, url, *good)).status == 200

        async def guessing(start: int) -> list[bytes]:
            return [await guess(proxy.port, number) for number in range(start, start + GUESSES // 10)]

        guesses = [asyncio.create_task(guessing(start)) for start in range(0, GUESSES, GUESSES // 10)]
        served = list[int]()
        while not all(task.done() for task in guesses):
            served.append((await curl(proxy, url, *good)).status)
        answered = [status for task in guesses for status in task.result()]
        assert len(answered) == GUESSES and set(answered) == {b"407", b"429"}
        assert len(served) > 2 and set(served) == {200}
        # All came from one address: beyond its burst it gets one guess every other second.
        assert hashing.count - 1 == answered.count(b"407") < 60
        await proxy.until(lambda found: audited(found) == GUESSES)  # every one


async def test_the_same_guess_again_is_not_hashed(tmp_path: Path, upstream: Upstream, hashing: Hashing) -> None:
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=CHEAP.hash("right"))
        assert {await guess(proxy.port, 1) for _ in range(20)} == {b"407"}
        assert hashing.count == 1


@pytest.mark.parametrize("line", ["CONNECT example.org:443", "GET http://example.org/"])
async def test_over_the_limit_429_says_when_to_ask_again(tmp_path: Path, line: str) -> None:
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=CHEAP.hash("right"), auth_password="plain")
        answered = [await guess(proxy.port, number, line) for number in range(10)]
        assert answered[: int(ADDRESS_BURST)] == [b"407"] * int(ADDRESS_BURST) and b"429" in answered
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Bearer yet another\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429") and b"retry-after: " in head.lower()
        writer.close()


def test_an_unknown_user_costs_the_same_hash(hashing: Hashing) -> None:
    accepted = Accepted(CaptureSettings(auth_username="anna", auth_password_hash=CHEAP.hash("right")))
    checked = list[bytes]()
    for header in (basic("anna", "wrong"), basic("nobody", "wrong"), basic("nobody", "right")):
        given = parse(header)
        assert accepted.needs_hashing(given)
        checked.append(accepted.verify(given))
    assert checked == [b"", b"", b""] and hashing.count == 3
    assert accepted.verify(parse(basic("anna", "right")))


def test_plain_secrets_are_compared_by_a_keyed_hash_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = list[tuple[int, int]]()
    real = hmac.compare_digest

    def watching(a: Any, b: Any) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watching)
    accepted = Accepted(CaptureSettings(auth_username="anna", auth_password="p" * 40, auth_token="t"))
    counts = set[int]()
    for header in (basic("anna", "p" * 40), basic("a", "p"), basic("anna", ""), basic("nobody", "t")):
        compared.clear()
        accepted.compare(parse(header))
        counts.add(len(compared))
        assert set(compared) == {(32, 32)}
    assert len(counts) == 1  # none is left out because another one was wrong already


async def test_two_hundred_guessing_addresses_lock_nobody_out(
    tmp_path: Path, upstream: Upstream, hashing: Hashing
) -> None:
    """Who guesses has been seen to guess; a user who has not is hashed before all of them."""
    refused: Counter[str] = Counter()

    async def guessing(address: str) -> None:
        for number in itertools.count():
            status = await guess(proxy.port, hash((address, number)), address=address)
            assert status in {b"407", b"429"}
            refused[address] += 1

    addresses = [f"127.0.9.{number}" for number in range(1, 201)]
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=FULL.hash("right"))
        guessers = [asyncio.create_task(guessing(address)) for address in addresses]
        await so(lambda: len(refused) > 150)
        hashed, url = hashing.count, f"http://127.0.0.1:{upstream.port}/plain"
        good = ("-H", "Proxy-Authorization: Bearer right", "--interface", "127.0.8.1")
        assert (await curl(proxy, url, *good)).status == 200
        # At most what was being hashed already, the user's own, and what came while curl read its answer.
        assert hashing.count - hashed < 10
        seen = refused.total()
        await so(lambda: refused.total() > seen + 100)
        assert not any(guesser.done() for guesser in guessers)
        for guesser in guessers:
            guesser.cancel()
        await asyncio.gather(*guessers, return_exceptions=True)


async def test_few_wait_for_the_thread() -> None:
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=CHEAP.hash("right"))))
    given = [parse(f"Bearer {number}") for number in range(MAX_WAITING + 5)]
    outcomes = await asyncio.gather(*(judge.verify(each, str(n)) for n, each in enumerate(given)))
    assert [outcome.throttled for outcome in outcomes] == [True] * 5 + [False] * MAX_WAITING  # those that came first
    await so(lambda: not judge._tickets)
    judge.close()


async def test_a_failing_hash_denies_and_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Accepted.verify

    def failing(accepted: Accepted, given: Given) -> bytes:
        if given.secret == b"bomb":
            raise MemoryError
        return right(accepted, given)

    monkeypatch.setattr(Accepted, "verify", failing)
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=CHEAP.hash("right"))))
    with pytest.raises(MemoryError):
        await judge.verify(parse("Bearer bomb"), "a")
    assert (await judge.verify(parse("Bearer right"), "b")).identity
    judge.close()


async def test_the_end_lets_nobody_wait() -> None:
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=FULL.hash("right"))))
    waiting = [asyncio.ensure_future(judge.verify(parse(f"Bearer {number}"), str(number))) for number in range(5)]
    await so(lambda: judge._thread is not None)
    judge.close()
    outcomes = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert not any(outcome.identity for outcome in outcomes)


async def test_a_change_while_it_is_hashed_decides_by_what_is_new() -> None:
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=FULL.hash("old"))))
    waiting = asyncio.ensure_future(judge.verify(parse("Bearer old"), "a"))
    await asyncio.sleep(0)
    judge.use(Accepted(CaptureSettings(auth_token="new")))
    assert not (await waiting).identity
    assert (judge.at_once(parse("Bearer new"), "a") or await waiting).identity
    judge.close()


async def test_who_waits_while_credentials_change_is_judged_by_the_new_ones() -> None:
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=FULL.hash("old"))))
    waiting = [asyncio.ensure_future(judge.verify(parse(f"Bearer {name}"), name)) for name in ("new", "x", "old")]
    await so(lambda: judge._thread is not None)
    judge.use(Accepted(CaptureSettings(auth_token_hash=FULL.hash("new"))))
    assert [bool(outcome.identity) for outcome in await asyncio.gather(*waiting)] == [True, False, False]
    judge.close()
