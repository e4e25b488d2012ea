"""Line 2: passwords and tokens are kept as argon2id hashes, and what is remembered of them holds no secret."""

import asyncio
import time
from pathlib import Path

import argon2
import pytest

from megido_capture.access.credentials import MAX_HEADER, Accepted, Given, keyed, matches, parse
from megido_capture.configuration.settings import CaptureSettings
from megido_shared.events import AuthAttempted
from tests.integration.capture.harness import curl, flows
from tests.integration.capture.upstream import Upstream
from tests.security.test_s01_proxy_authentication import basic
from tests.support.inside import Inside, inside

pytestmark = pytest.mark.timeout(120)

CHEAP = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
FULL = argon2.PasswordHasher()
TOKEN, PASSWORD = "t0ken-of-256-bits", "pässword:2"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The secrets that were really hashed, as they are."""
    secrets = list[bytes]()
    verify = Accepted.verify

    def noting(accepted: Accepted, given: Given) -> bytes:
        secrets.append(given.secret)
        return verify(accepted, given)

    monkeypatch.setattr(Accepted, "verify", noting)
    return secrets


async def asked(proxy: Inside, upstream: Upstream, header: str) -> int:
    answer = await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain", "-H", f"Proxy-Authorization: {header}")
    return answer.status


async def test_hashed_credentials(tmp_path: Path, upstream: Upstream) -> None:
    hashes = {"auth_password_hash": FULL.hash(PASSWORD), "auth_token_hash": FULL.hash(TOKEN)}
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_username="anna", **hashes)
        assert await asked(proxy, upstream, f"Bearer {TOKEN}") == 200
        assert await asked(proxy, upstream, basic("who", TOKEN)) == 200
        assert await asked(proxy, upstream, basic("anna", PASSWORD)) == 200
        assert await asked(proxy, upstream, basic("otto", PASSWORD)) == 407
        assert await asked(proxy, upstream, f"Bearer {PASSWORD}") == 407
        found = flows(await proxy.events(), AuthAttempted)
        assert [attempt.success for attempt in found] == [True, True, True, False, False]
        assert [attempt.username for attempt in found] == ["", "who", "anna", "otto", ""]
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (TOKEN, PASSWORD, *hashes.values()):
            assert secret.encode() not in content, path


async def test_a_hash_stops_counting_with_the_configuration(tmp_path: Path, upstream: Upstream) -> None:
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=CHEAP.hash("old"), auth_password_hash=CHEAP.hash("kept"))
        assert await asked(proxy, upstream, "Bearer old") == 200
        assert await asked(proxy, upstream, basic("x", "kept")) == 200
        proxy.apply(auth_token_hash=CHEAP.hash("new"))
        assert await asked(proxy, upstream, "Bearer old") == 407
        assert await asked(proxy, upstream, "Bearer new") == 200
        assert await asked(proxy, upstream, basic("x", "kept")) == 200
        proxy.apply(auth_token_hash="")
        assert await asked(proxy, upstream, "Bearer new") == 407


async def test_right_credentials_are_remembered_while_others_change(
    tmp_path: Path, upstream: Upstream, hashed: list[bytes]
) -> None:
    async def ask(header: str) -> int:
        return await asked(proxy, upstream, header)

    token, password = "Bearer token", basic("anna", "password")
    async with inside(tmp_path) as proxy:
        hashes = {"auth_token_hash": CHEAP.hash("token"), "auth_password_hash": CHEAP.hash("password")}
        proxy.apply(auth_required=True, auth_username="anna", **hashes)
        assert [await ask(token), await ask(password)] == [200, 200]
        assert hashed == [b"token", b"password"]
        proxy.apply(max_body_size=1000)
        assert [await ask(token), await ask(password)] == [200, 200] and len(hashed) == 2
        proxy.apply(auth_token_hash=CHEAP.hash("other"))
        assert await ask(password) == 200 and len(hashed) == 2
        assert await ask(token) == 407 and hashed[2:] == [b"token"]
        proxy.apply(auth_username="otto")
        assert await ask(password) == 407 and hashed[3:] == [b"password"]
        # The same secret hashed anew is another credential: it is verified again.
        proxy.apply(auth_username="anna", auth_password_hash=CHEAP.hash("password"))
        assert await ask(password) == 200 and hashed[4:] == [b"password"]


async def test_the_loop_goes_on_while_a_hash_is_computed(tmp_path: Path, upstream: Upstream) -> None:
    """The slow part is in a thread: this loop, which is the proxy's own, answers others meanwhile."""
    slow = argon2.PasswordHasher(time_cost=12, memory_cost=65536, parallelism=1)
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token="plain", auth_token_hash=slow.hash("hashed"))
        hashing = asyncio.create_task(asked(proxy, upstream, "Bearer hashed"))
        served = 0
        while not hashing.done():
            served += await asked(proxy, upstream, "Bearer plain") == 200
        assert await hashing == 200 and served > 1


async def test_three_hundred_connections_with_the_same_credentials_hash_once(
    tmp_path: Path, upstream: Upstream, hashed: list[bytes]
) -> None:
    async with inside(tmp_path) as proxy:
        proxy.apply(auth_required=True, auth_token_hash=FULL.hash(TOKEN))

        async def ask(number: int) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            header = basic(f"user-{number}", TOKEN)
            writer.write(
                f"GET http://127.0.0.1:{upstream.port}/plain/{number} HTTP/1.1\r\nHost: x\r\n"
                f"Connection: close\r\nProxy-Authorization: {header}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return head.split(b" ")[1]

        # Some come together, while the first is still hashed.
        assert set(await asyncio.gather(*(ask(number) for number in range(60)))) == {b"200"}
        for start in range(60, 300, 20):
            assert set(await asyncio.gather(*(ask(start + number) for number in range(20)))) == {b"200"}
        assert hashed == [TOKEN.encode()]
        assert len(flows(await proxy.events(), AuthAttempted)) == 300


def test_a_user_name_that_makes_no_difference_is_not_hashed_for() -> None:
    anybody = Accepted(CaptureSettings(auth_token_hash="h"))
    assert len({anybody.memory_key(parse(basic(name, "x"))) for name in "abc"}) == 1
    named = Accepted(CaptureSettings(auth_username="a", auth_password_hash="h"))
    assert len({named.memory_key(parse(basic(name, "x"))) for name in "abc"}) == 2


def test_what_is_remembered_is_keyed() -> None:
    assert keyed(b"ab", b"c") != keyed(b"a", b"bc") and len(keyed(b"")) == 32
    accepted = Accepted(CaptureSettings(auth_token="canary-token", auth_password_hash="canary-hash"))
    remembered = b"".join(accepted.identities) + accepted.memory_key(parse("Bearer canary-token"))
    assert b"canary" not in remembered
    assert "canary" not in repr(CaptureSettings(auth_token="canary", auth_token_hash="canary", auth_password="canary"))


@pytest.mark.parametrize("broken", ["", "x", "$argon2id$", "$argon2id$v=19$m=65536,t=3,p=4$x", "$2b$12$abc"])
def test_a_hash_that_cannot_be_read_matches_nothing(broken: str) -> None:
    assert not matches(broken, b"") and not matches(broken, broken.encode())


def test_only_a_short_header_is_looked_at() -> None:
    began = time.process_time()
    assert parse("Basic " + "=" * (MAX_HEADER * 100)).problem == "credentials too long"
    assert time.process_time() - began < 1
