"""A proxy that polls: an older API in the founding form, one that was upgraded, one that fails in every way."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from megido_capture.configuration import source
from megido_shared.config import ProxySettings, Snapshot, encode_snapshot
from tests.integration.capture.harness import DEADLINE, Proxy, capture, curl
from tests.integration.capture.test_liveconfig import Live
from tests.integration.capture.upstream import Upstream, serving
from tests.support.inside import inside
from tests.support.raw_server import RawServer, Talk

pytestmark = pytest.mark.timeout(180)

CONFIG, RULES = b"/proxy/api/config/active/", b"/interceptor/api/payload-rules/active/"
RULE = {
    "id": 3,
    "name": "mark",
    "target_url_pattern": "/echo",
    "injection_type": "header",
    "injection_point": "X-Mark",
    "payload_content": "founding",
    "active": True,
    "target_apps": [],
    "created_by": 1,
    "created_by_username": "ann",
    "created_at": "2024-01-01T00:00:00Z",
    "updated_at": "2024-01-01T00:00:00Z",
}
"""With all that the founding document's API says of one."""


class Behind:
    """What stands at `api_url`. `answer` decides what a question gets."""

    def __init__(self) -> None:
        self.answer: Callable[[bytes], bytes | None] = older(RULE)
        self.asked: list[bytes] = []
        """Heads of what was answered with the current `answer`."""

    async def __call__(self, talk: Talk) -> None:
        head = await talk.head()
        self.asked.append(head)
        given = self.answer(head)
        if given is None:
            talk.reset()
        else:
            await talk.say(given)

    async def becomes(self, answer: Callable[[bytes], bytes | None], times: int = 2) -> None:
        """Returns once it was asked `times` under the new answer, so that all but the last are dealt with."""
        self.answer, self.asked = answer, []
        async with asyncio.timeout(DEADLINE):
            while len(self.asked) < times:
                await asyncio.sleep(0.02)


def said(status: str, document: Any = None, *fields: str) -> bytes:
    body = b"" if document is None else json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def older(*rules: dict[str, Any]) -> Callable[[bytes], bytes]:
    """Knows rules alone, and none of our routes."""

    def answer(head: bytes) -> bytes:
        if head.split(b" ")[1].startswith(RULES):
            return said("200 OK", {"success": True, "count": len(rules), "rules": rules})
        return said("404 Not Found", {"detail": "Not found."})

    return answer


def ours(version: int, **settings: Any) -> Callable[[bytes], bytes]:
    """Answers in full, or 304 to whoever knows this version."""
    snapshot = Snapshot(scope="global", version=version, settings=ProxySettings(**settings))
    document = {"snapshots": [json.loads(encode_snapshot(snapshot))]}
    tag = f'"v{version}"'

    def answer(head: bytes) -> bytes:
        if f"if-none-match: {tag}".encode() in head.lower():
            return said("304 Not Modified", None, f"ETag: {tag}")
        return said("200 OK", document, f"ETag: {tag}")

    return answer


@pytest.fixture
async def behind() -> AsyncIterator[Behind]:
    yield Behind()


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with serving() as found:
        yield found


async def marked(proxy: Proxy, upstream: Upstream) -> bytes:
    body = (await curl(proxy, f"http://127.0.0.1:{upstream.port}/echo")).body
    return body.partition(b"X-Mark: ")[2].partition(b"\r\n")[0]


async def until_marked(proxy: Proxy, upstream: Upstream, wanted: bytes) -> None:
    async with asyncio.timeout(DEADLINE):
        while await marked(proxy, upstream) != wanted:
            await asyncio.sleep(0.1)


async def test_rules_of_an_older_api_and_what_follows_its_upgrade(
    tmp_path: Path, behind: Behind, upstream: Upstream
) -> None:
    async with RawServer(behind) as server:
        options = ("--api-url", f"http://127.0.0.1:{server.port}/", "--cache-ttl", "1", "--source-app", "a b")
        async with capture(tmp_path / "data", *options) as proxy:
            live = Live(proxy)
            await until_marked(proxy, upstream, b"founding")
            assert any(RULES + b"?source_app=a+b HTTP" in head for head in behind.asked)
            await behind.becomes(older(RULE | {"payload_content": "changed"}))
            await until_marked(proxy, upstream, b"changed")
            await behind.becomes(older())
            await until_marked(proxy, upstream, b"")

            await behind.becomes(ours(4, ip_blacklist="127.0.0.1"), times=3)
            assert behind.asked[0].count(b"f-none-match") == 0 and b'"v4"' in behind.asked[-1], "the rest were 304s"
            await live.status(lambda status: status.config_version == 4)
            assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/echo")).status != 200
            # Put back, it knows rules only: they are taken, and what else was in force stays.
            await behind.becomes(older(RULE))
            assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/echo")).status != 200
            # Upgraded again to the very same: a 304 from before would leave the older one's rules in force.
            await behind.becomes(ours(4, ip_blacklist="127.0.0.1"))
            assert b"f-none-match" not in behind.asked[0]
            await behind.becomes(ours(5))
            await until_marked(proxy, upstream, b"")


def cut_short(head: bytes) -> bytes:
    return ours(9)(head)[:-20]


FAILURES: dict[str, Callable[[bytes], bytes | None]] = {
    "reset": lambda _: None,
    "nothing": lambda _: b"",
    "cut within the body": cut_short,
    "500": lambda _: said("500 Internal Server Error", {}),
    "401": lambda _: said("401 Unauthorized", {}),
    "a redirect": lambda _: said("302 Found", {}, "Location: http://127.0.0.1:9/"),
    "no JSON": lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>",
    "something else": lambda _: said("200 OK", {"snapshots": {}}),
    "no scope at all": lambda _: said("200 OK", {"snapshots": []}),
    "another scope": lambda _: said("200 OK", {"snapshots": [{"scope": "app:browser", "version": 9}]}),
    "404 everywhere": lambda _: said("404 Not Found", {}),
    "a bomb": lambda _: b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b" " * (source.MAX_ANSWER + 1),
}


async def test_whatever_the_api_does_what_is_in_force_stays(
    tmp_path: Path, behind: Behind, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next good answer is taken."""
    for pause in ("RETRY_AFTER", "POLL_EVERY"):
        monkeypatch.setattr(source, pause, 0.1)
    url = f"http://127.0.0.1:{upstream.port}/plain"
    behind.answer = ours(3, ip_blacklist="127.0.0.1")
    async with (
        RawServer(behind) as server,
        inside(tmp_path / "data", api_url=f"http://127.0.0.1:{server.port}", cache_ttl=1) as proxy,
    ):
        live = Live(proxy)
        await live.status(lambda status: status.config_version == 3)
        for name, answer in FAILURES.items():
            await behind.becomes(answer, times=1)  # those before it have been dealt with
            assert (await curl(proxy, url)).status != 200, name
        await behind.becomes(answer)
        assert (await curl(proxy, url)).status != 200 and not upstream.seen
        await live.status(lambda status: status.config_stale)
        await behind.becomes(ours(4))
        await live.status(lambda status: status.config_version == 4 and not status.config_stale)
        assert (await curl(proxy, url)).status == 200
