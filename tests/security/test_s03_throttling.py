"""Line 3: comparisons take the same time, unknown users cost a hash too, and guesses are throttled before they do."""

import asyncio
import hmac
from pathlib import Path
from typing import Any

import argon2
import pytest

from megido_capture.access import verifier
from megido_capture.access.credentials import Accepted, Given, parse
from megido_capture.access.verifier import ADDRESS_BURST, MAX_WAITING, TOTAL_BURST, Throttle, Verifier
from megido_capture.configuration.settings import CaptureSettings
from megido_shared.events import AuthAttempted
from tests.integration.capture.harness import curl, flows
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


async def guess(port: int, number: int, line: str = "CONNECT example.org:443") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Bearer guess-{number}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return head.split(b" ")[1]


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
        found = flows(await proxy.events(), AuthAttempted)
        assert sum(not attempt.success for attempt in found) == GUESSES  # every one is audited


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
        # What needs no hash is not throttled.
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(f"GET http://mitm.it/ HTTP/1.1\r\nProxy-Authorization: {basic('x', 'plain')}\r\n\r\n".encode())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
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


def test_buckets() -> None:
    now = 0.0
    throttle = Throttle(lambda: now)
    assert [throttle.take("a") for _ in range(6)] == [True] * 5 + [False]
    assert throttle.take("b")  # another address is another bucket
    throttle.give_back("a")
    assert throttle.take("a") and not throttle.take("a")
    assert sum(throttle.take(f"c{number}") for number in range(20)) == TOTAL_BURST - 6  # and one for all
    now = 2.0
    assert throttle.take("a") and not throttle.take("a")
    now = 1e6
    assert sum(throttle.take("a") for _ in range(20)) == ADDRESS_BURST


def test_addresses_fill_no_memory() -> None:
    throttle = Throttle(lambda: 0.0)
    for number in range(verifier.REMEMBERED_ADDRESSES + 100):
        throttle.take(str(number))
    assert len(throttle._addresses) == verifier.REMEMBERED_ADDRESSES


async def test_few_wait_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "TOTAL_BURST", 1000.0)
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=CHEAP.hash("right"))))
    given = [parse(f"Bearer {number}") for number in range(MAX_WAITING + 5)]
    outcomes = await asyncio.gather(*(judge.verify(each, str(n)) for n, each in enumerate(given)))
    assert sum(outcome.throttled for outcome in outcomes) == 5
    assert not judge._waiting
    judge.close()


async def test_a_change_while_it_is_hashed_decides_by_what_is_new() -> None:
    judge = Verifier(Accepted(CaptureSettings(auth_token_hash=FULL.hash("old"))))
    waiting = asyncio.ensure_future(judge.verify(parse("Bearer old"), "a"))
    await asyncio.sleep(0)
    judge.use(Accepted(CaptureSettings(auth_token="new")))
    assert not (await waiting).identity
    assert (judge.at_once(parse("Bearer new")) or await waiting).identity
    judge.close()
