"""The cache of static assets, seen from both ends: what curl gets, and what the origin was asked."""

import asyncio
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme

from megido_capture.cache.static import OBJECT
from megido_shared.config import PayloadRule
from megido_shared.events import unpack_headers
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import ROOT, body, capture, curl, flows
from tests.support.inside import Inside, inside
from tests.support.raw_server import RawServer, Talk

PNG = b"\x89PNG" + bytes(range(256))


def reply(*lines: str, content: bytes = PNG, status: str = "200 OK", kind: str = "image/png", age: int = 0) -> bytes:
    """An answer that its origin says to have made `age` seconds ago."""
    head = [f"HTTP/1.1 {status}", f"Date: {formatdate(time.time() - age, usegmt=True)}", *lines]
    if kind:
        head.append(f"Content-Type: {kind}")
    if not any(line.startswith(("Transfer-Encoding", "Connection: close")) for line in lines):
        head.append(f"Content-Length: {len(content)}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


class Origin:
    """Answers each request with the next of `answers`, the last one for ever. `asked` holds the heads."""

    def __init__(self) -> None:
        self.answers: list[bytes | Callable[[bytes], bytes]] = []
        self.asked: list[bytes] = []
        self.port = 0

    async def script(self, talk: Talk) -> None:
        while True:
            head = await talk.head()
            self.asked.append(head)
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    await talk.exactly(int(line.split(b":")[1]))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            answer = answer if isinstance(answer, bytes) else answer(head)
            await talk.say(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if head.startswith(b"HEAD") else answer)
            if b"\r\nConnection: close" in answer:
                return

    def url(self, path: str = "/logo.png", scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    found = Origin()
    async with RawServer(found.script) as server:
        found.port = server.port
        yield found


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Inside]:
    async with inside(tmp_path / "data", cache_enabled=True) as found:
        yield found
        assert not [name for name in found.node.parts.counters if name.startswith("hook_errors")]


async def get(proxy: Any, url: str, *arguments: str) -> tuple[dict[str, str], bytes]:
    """Header fields (names in lower case; "status" is the status) and body."""
    answer = await curl(proxy, url, "-i", *arguments)
    assert answer.code == 0
    head, _, content = answer.body.partition(b"\r\n\r\n")
    while head.startswith((b"HTTP/1.1 200 Connection", b"HTTP/1.1 100")):
        head, _, content = content.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {**fields, "status": first.split(" ")[1]}, content


async def test_a_fresh_response_comes_from_memory_and_says_so(proxy: Inside, origin: Origin) -> None:
    origin.answers = [reply("Cache-Control: max-age=1000", "X-Case: Kept", "Connection: X-Hop", "X-Hop: 1", age=10)]
    first, content = await get(proxy, origin.url())
    second, again = await get(proxy, origin.url())
    assert content == again == PNG and len(origin.asked) == 1
    assert "age" not in first and 10 <= int(second["age"]) < 900
    assert (second["status"], second["content-type"], second["x-case"]) == ("200", "image/png", "Kept")
    assert first["date"] == second["date"] and "x-hop" in first and "x-hop" not in second
    found = await proxy.events()
    fetched, hit = flows(found)
    assert (fetched.cached, hit.cached) == (False, True) and body(found, hit) == PNG
    assert hit.response.status == 200 and hit.server.ip == ""
    counters = proxy.node.parts.counters
    assert (counters["cache_misses"], counters["cache_stored"], counters["cache_hits"]) == (1, 1, 1)


async def test_a_stale_one_is_asked_about_and_freshened_by_304(proxy: Inside, origin: Origin) -> None:
    origin.answers = [
        reply('ETag: "1"', "Last-Modified: Tue, 01 Jan 2019 00:00:00 GMT", "Cache-Control: max-age=50", age=100),
        reply('ETag: "1"', "Cache-Control: max-age=500", "X-New: 1", status="304 Not Modified", content=b"", kind=""),
        b"not asked again",
    ]
    await get(proxy, origin.url())
    for number in range(2):
        answer, content = await get(proxy, origin.url())
        assert (answer["status"], answer["x-new"], content) == ("200", "1", PNG)
        assert answer["content-length"] == str(len(PNG)) and ("age" in answer) == bool(number)
    assert len(origin.asked) == 2 and b'If-None-Match: "1"' in origin.asked[1]
    assert b"If-Modified-Since: Tue, 01 Jan 2019" in origin.asked[1]
    fetched, revalidated, hit = flows(await proxy.events())
    assert [flow.cached for flow in (fetched, revalidated, hit)] == [False, True, True]
    assert b"If-None-Match" not in dict(unpack_headers(revalidated.request.headers))
    assert proxy.node.parts.counters["cache_revalidated"] == 1


async def test_a_stale_one_is_replaced_by_200(proxy: Inside, origin: Origin) -> None:
    origin.answers = [
        reply('ETag: "1"', "Cache-Control: max-age=50", age=100),
        reply('ETag: "2"', "Cache-Control: max-age=50", content=b"new"),
        b"not asked again",
    ]
    assert [(await get(proxy, origin.url()))[1] for _ in range(3)] == [PNG, b"new", b"new"]
    assert [flow.cached for flow in flows(await proxy.events())] == [False, False, True]


async def test_a_stale_one_is_gone_when_its_successor_may_not_be_stored(proxy: Inside, origin: Origin) -> None:
    origin.answers = [
        reply('ETag: "1"', "Cache-Control: max-age=50", age=100),
        reply("Cache-Control: no-store", content=b"new"),
    ]
    assert [(await get(proxy, origin.url()))[1] for _ in range(3)] == [PNG, b"new", b"new"]
    assert len(origin.asked) == 3 and b"If-None-Match" not in origin.asked[2]


async def test_304_for_something_else_answers_once_and_is_not_believed(proxy: Inside, origin: Origin) -> None:
    origin.answers = [
        reply('ETag: "1"', "Cache-Control: max-age=50", age=100),
        reply('ETag: "other"', status="304 Not Modified", content=b"", kind=""),
        reply("Cache-Control: max-age=50", content=b"whole"),
    ]
    assert [(await get(proxy, origin.url()))[1] for _ in range(3)] == [PNG, PNG, b"whole"]
    assert b"If-None-Match" not in origin.asked[2]


async def test_an_error_while_asking_about_a_stale_one_reaches_the_client(proxy: Inside, origin: Origin) -> None:
    origin.answers = [
        reply('ETag: "1"', "Cache-Control: max-age=50", age=100),
        reply(status="503 Busy", content=b"busy"),
        reply('ETag: "1"', "Cache-Control: max-age=50", status="304 Not Modified", content=b"", kind=""),
    ]
    answers = [await get(proxy, origin.url()) for _ in range(3)]
    assert [(answer["status"], content) for answer, content in answers] == [
        ("200", PNG),
        ("503", b"busy"),
        ("200", PNG),
    ]


async def test_each_variant_of_vary_is_kept_by_itself(proxy: Inside, origin: Origin) -> None:
    def by_language(head: bytes) -> bytes:
        language = b"de" if b"Accept-Language: de" in head else b"en"
        return reply("Vary: Accept-Language", "Cache-Control: max-age=500", content=language, kind="text/css")

    origin.answers = [by_language]
    for _ in range(2):
        for language in ("de", "en"):
            _, content = await get(proxy, origin.url(), "-H", f"Accept-Language: {language}")
            assert content.decode() == language
    assert len(origin.asked) == 2 and not any(b"If-" in head for head in origin.asked)


FRESH = "Cache-Control: max-age=500"


@pytest.mark.parametrize(
    "answer",
    [
        reply("Cache-Control: no-store"),
        reply("Cache-Control: private, max-age=500"),
        reply(FRESH, kind="application/json"),
        reply(FRESH, kind="text/html"),
        reply(FRESH, "Set-Cookie: a=b"),
        reply(FRESH, "Vary: *"),
        reply(FRESH, "Content-Encoding: gzip"),
        reply(FRESH, "Connection: close"),
        reply(FRESH, status="404 Not Found"),
        reply("Cache-Control: max-age=50", "Age: 60"),
        reply("Expires: 0"),
        reply(FRESH, content=bytes(OBJECT + 1)),
        reply(FRESH, "Transfer-Encoding: chunked", content=b"%x\r\n%s\r\n0\r\n\r\n" % (OBJECT + 1, bytes(OBJECT + 1))),
    ],
    ids=[
        "no-store",
        "private",
        "json",
        "html",
        "cookie",
        "vary-all",
        "gzip",
        "close",
        "404",
        "aged",
        "expired",
        "large",
        "large-chunked",
    ],
)
async def test_what_may_not_be_answered_from_memory(proxy: Inside, origin: Origin, answer: bytes) -> None:
    origin.answers = [answer]
    first, second = [await get(proxy, origin.url()) for _ in range(2)]
    assert first[1] == second[1] and len(first[1]) in (len(PNG), OBJECT + 1)
    assert len(origin.asked) == 2 and [flow.cached for flow in flows(await proxy.events())] == [False, False]


@pytest.mark.parametrize(
    "answer",
    [
        reply("Cache-Control: s-maxage=500, max-age=0"),
        reply(f"Expires: {formatdate(2_000_000_000, usegmt=True)}"),
        reply("Last-Modified: Tue, 01 Jan 2019 00:00:00 GMT"),
        reply(FRESH, "Content-Encoding: gzip", "Vary: Accept-Encoding"),
        reply(FRESH, "Transfer-Encoding: chunked", content=b"104\r\n%s\r\n0\r\n\r\n" % PNG),
        reply(FRESH, kind="text/css; charset=utf-8"),
        reply(FRESH, kind="font/woff2"),
        reply(FRESH, kind="application/wasm"),
        reply(FRESH, content=b""),
        reply(FRESH).replace(b"Date: ", b"X-Date: "),
    ],
    ids=["s-maxage", "expires", "heuristic", "gzip", "chunked", "css", "font", "wasm", "empty", "no-date"],
)
async def test_what_may(proxy: Inside, origin: Origin, answer: bytes) -> None:
    origin.answers = [answer]
    first, second = [await get(proxy, origin.url()) for _ in range(2)]
    assert first[1] == second[1] and len(origin.asked) == 1
    assert [flow.cached for flow in flows(await proxy.events())] == [False, True]


ALICE, BOB, TOKEN = "Cookie: sid=alice", "Cookie: sid=bob", "Authorization: Bearer x"
NOBODY = "X-Nothing: 1"


@pytest.mark.parametrize(
    ("first", "then"), [(ALICE, BOB), (ALICE, NOBODY), (NOBODY, BOB), (TOKEN, BOB), (NOBODY, TOKEN)]
)
@pytest.mark.parametrize(
    ("lines", "asked"),
    [
        (("Cache-Control: max-age=500",), 2),
        (("Last-Modified: Tue, 01 Jan 2019 00:00:00 GMT",), 2),
        (("Cache-Control: public", "Last-Modified: Tue, 01 Jan 2019 00:00:00 GMT"), 2),
        (("Cache-Control: public, max-age=500", "Set-Cookie: a=b"), 2),
        (("Cache-Control: public, max-age=500",), 1),
        (("Cache-Control: s-maxage=500",), 1),
    ],
    ids=["max-age", "heuristic", "public-heuristic", "sets-cookie", "public", "s-maxage"],
)
async def test_clients_share_what_is_said_to_be_everybodys(
    proxy: Inside, origin: Origin, lines: tuple[str, ...], asked: int, first: str, then: str
) -> None:
    origin.answers = [reply(*lines)]
    for line in (first, then):
        await get(proxy, origin.url(), "-H", line)
    assert len(origin.asked) == asked


@pytest.mark.parametrize(
    "line",
    [
        *("X-Forwarded-Host: evil", "X-Forwarded-For: 1.1.1.1", "Forwarded: host=evil", "X-Original-URL: /a"),
        *("X-Rewrite-URL: /a", "X-Host: evil", "X-HTTP-Method-Override: POST"),
    ],
)
async def test_nobody_chooses_what_others_get(proxy: Inside, origin: Origin, line: str) -> None:
    origin.answers = [reply(FRESH, content=b"poisoned"), reply(FRESH)]
    assert (await get(proxy, origin.url(), "-H", line))[1] == b"poisoned"
    assert (await get(proxy, origin.url()))[1] == PNG
    await get(proxy, origin.url(), "-H", line)
    assert len(origin.asked) == 3


async def test_what_replaces_a_shared_answer_is_shared_only_when_it_says_so(proxy: Inside, origin: Origin) -> None:
    origin.answers = [
        reply('ETag: "1"', "Cache-Control: public, max-age=50", age=100),
        reply("Cache-Control: max-age=500", content=b"alice's"),
        reply(FRESH),
    ]
    bodies = [(await get(proxy, origin.url(), "-H", line))[1] for line in (NOBODY, ALICE, NOBODY)]
    assert bodies == [PNG, b"alice's", PNG]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-r", "0-3"),
        ("-I",),
        ("-H", "Cache-Control: no-cache"),
        ("-H", "Cache-Control: no-store"),
        ("-H", "Cache-Control: max-age=0"),
        ("-H", "Pragma: no-cache"),
        ("-H", 'If-None-Match: "1"'),
        ("-H", "Host: elsewhere"),
        ("-X", "GET", "-d", "a body"),
    ],
    ids=" ".join,
)
async def test_requests_that_go_to_the_origin(proxy: Inside, origin: Origin, arguments: tuple[str, ...]) -> None:
    origin.answers = [reply(FRESH)]
    await get(proxy, origin.url())
    await get(proxy, origin.url(), *arguments)
    assert len(origin.asked) == 2 and proxy.node.parts.counters["cache_hits"] == 0


@pytest.mark.parametrize(("status", "asked"), [("200 OK", 3), ("500 Broken", 2)])
async def test_an_unsafe_request_that_succeeds_invalidates(
    proxy: Inside, origin: Origin, status: str, asked: int
) -> None:
    origin.answers = [reply(FRESH), reply(status=status), reply(FRESH)]
    await get(proxy, origin.url())
    await get(proxy, origin.url(), "-d", "changed")
    await get(proxy, origin.url())
    assert len(origin.asked) == asked


async def test_turned_off_it_is_emptied(proxy: Inside, origin: Origin) -> None:
    origin.answers = [reply(FRESH)]
    await get(proxy, origin.url())
    for enabled, asked in ((False, 2), (True, 3), (True, 3)):
        proxy.apply(cache_enabled=enabled)
        answer, content = await get(proxy, origin.url())
        assert (answer["status"], content, len(origin.asked)) == ("200", PNG, asked)


async def test_other_blocked_destinations_empty_it_too(proxy: Inside, origin: Origin) -> None:
    origin.answers = [reply(FRESH)]
    await get(proxy, origin.url())
    proxy.apply(blocked_destinations="example.com")
    await get(proxy, origin.url())
    assert len(origin.asked) == 2


async def test_what_was_under_way_when_others_were_blocked_is_not_kept(proxy: Inside, origin: Origin) -> None:
    async def script(talk: Talk) -> None:
        await talk.head()
        origin.asked.append(b"")
        head, _, content = reply(FRESH).partition(b"\r\n\r\n")
        await talk.say(head + b"\r\n\r\n" + content[:5])
        if len(origin.asked) == 1:
            async with asyncio.timeout(30):
                while not any(state.fetch for state in proxy.node.parts.registry.flows.values()):
                    await asyncio.sleep(0.01)
            proxy.apply(blocked_destinations="example.com")
        await talk.say(content[5:])

    async with RawServer(script) as server:
        origin.port = server.port
        for asked in (1, 2, 2):
            _, content = await get(proxy, origin.url())
            assert (content, len(origin.asked)) == (PNG, asked)


async def test_turned_off_while_it_asks_the_client_gets_what_it_asked_for(proxy: Inside, origin: Origin) -> None:
    def not_modified(_: bytes) -> bytes:
        proxy.apply(cache_enabled=False)
        return reply('ETag: "1"', status="304 Not Modified", content=b"", kind="")

    origin.answers = [reply('ETag: "1"', "Cache-Control: max-age=50", age=100), not_modified]
    await get(proxy, origin.url())
    answer, content = await get(proxy, origin.url())
    assert (answer["status"], content) == ("200", PNG)


async def test_access_control_stands_before_it(tmp_path: Path, origin: Origin) -> None:
    origin.answers = [reply(FRESH)]
    async with inside(tmp_path / "data", cache_enabled=True, auth_required=True, auth_token="letmein") as proxy:
        for _ in range(2):
            assert (await get(proxy, origin.url(), "--proxy-user", "me:letmein"))[1] == PNG
        assert (await get(proxy, origin.url()))[0]["status"] == "407"
        assert proxy.node.parts.counters["cache_hits"] == 1 and len(origin.asked) == 1


async def test_what_a_payload_rule_changed_passes_it_by(proxy: Inside, origin: Origin) -> None:
    origin.answers = [reply(FRESH)]
    await get(proxy, origin.url())
    rule = PayloadRule(
        id=1,
        name="one",
        target_url_pattern="logo",
        injection_type="header",
        injection_point="X-User",
        payload_content="1",
    )
    proxy.node.parts.rule_set.replace([rule])
    for _ in range(2):
        await get(proxy, origin.url())
    assert len(origin.asked) == 3 and proxy.node.parts.counters["cache_hits"] == 0


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
async def test_over_https_by_the_real_command(tmp_path: Path, authority: trustme.CA, trusted: str, flag: str) -> None:
    origin = Origin()
    origin.answers = [reply(FRESH, "X-Case: Kept")]
    tls: ssl.SSLContext = server_context(authority, "127.0.0.1")
    options = ("--set", f"ssl_verify_upstream_trusted_ca={trusted}", "--set", "cache_enabled=true")
    async with RawServer(origin.script, tls=tls) as server, capture(tmp_path / "data", *options) as proxy:
        origin.port = server.port
        for number in range(2):
            answer, content = await get(proxy, origin.url(scheme="https"), flag)
            assert (answer["status"], content, "age" in answer) == ("200", PNG, bool(number))
        assert len(origin.asked) == 1
        assert [flow.cached for flow in flows(await proxy.events())] == [False, True]


async def test_what_is_off_is_not_loaded(tmp_path: Path) -> None:
    code = "import sys, megido_capture.__main__; assert not [name for name in sys.modules if 'hishel' in name]"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
    assert await process.wait() == 0
