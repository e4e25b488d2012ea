"""The configuration changes what a running proxy does, without a restart; and what a start does without a bus."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import argon2
import pytest
import websockets
from websockets.asyncio.server import ServerConnection, serve

from megido_capture.rules.injection import BODY_CAP
from megido_shared.bus.local import LocalBus
from megido_shared.config import PayloadRule, ProxySettings, Snapshot, encode_snapshot
from megido_shared.datadir import DataDir
from megido_shared.events import AuthAttempted, FlowFailed, NodeStatus, WebSocketMessage
from tests.integration.capture import harness
from tests.integration.capture.harness import Answer, Proxy, capture, curl, flows, read_events, until
from tests.integration.capture.upstream import Upstream, full_backlog
from tests.support.raw_server import RawServer, Talk


@dataclass
class Live:
    """A running proxy and its configuration, which `set` replaces as a whole and waits until it is applied."""

    proxy: Proxy
    versions: list[int] = field(default_factory=lambda: [0])

    @property
    def bus(self) -> LocalBus:
        return LocalBus(DataDir(self.proxy.data_dir))

    async def set(self, *rules: PayloadRule, **settings: Any) -> None:
        await self.offer("global", *rules, **settings)
        await self.status(lambda status: status.config_version == self.versions[0] and not status.config_error)

    async def offer(self, scope: str, *rules: PayloadRule, **settings: Any) -> None:
        self.versions[0] += 1
        snapshot = Snapshot(scope=scope, version=self.versions[0], rules=rules, settings=ProxySettings(**settings))
        await self.bus.put_config(scope, encode_snapshot(snapshot))

    async def status(self, enough: Callable[[NodeStatus], bool]) -> NodeStatus:
        """The newest heartbeat, once it is `enough`."""

        async def newest() -> NodeStatus:
            return [event for event in await read_events(self.proxy.data_dir) if isinstance(event, NodeStatus)][-1]

        return await until(newest, enough)

    async def curl(self, url: str, *arguments: str) -> Answer:
        return await curl(self.proxy, url, *arguments)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[Live]:
    option = f"ssl_verify_upstream_trusted_ca={trusted}"
    found = harness.start(tmp_path_factory.mktemp("live"), "--set", option)
    yield Live(found)
    assert found.stop() == 0


@pytest.fixture
async def live(process: Live) -> AsyncIterator[Live]:
    """One proxy for all; each test leaves the defaults behind."""
    yield Live(process.proxy.from_now(), process.versions)
    await process.set()


def a_rule(kind: Any, point: str, payload: str, number: int = 1, pattern: str = "/echo") -> PayloadRule:
    return PayloadRule(
        id=number,
        name=f"rule {number}",
        target_url_pattern=pattern,
        injection_type=kind,
        injection_point=point,
        payload_content=payload,
    )


async def test_logging_enabled(live: Live, upstream: Upstream) -> None:
    await live.set(logging_enabled=False)
    assert (await live.curl(f"http://127.0.0.1:{upstream.port}/plain/unseen")).status == 200
    await live.set()
    assert (await live.curl(f"http://127.0.0.1:{upstream.port}/plain/seen")).status == 200
    [flow] = flows(await live.proxy.events())
    assert flow.request.target == b"/plain/seen"


async def test_log_request_body_and_log_response_body(live: Live, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain"
    for request, response in ((True, False), (False, True)):
        await live.set(log_request_body=request, log_response_body=response)
        await live.curl(url, "-d", "abc")
        flow = flows(await live.proxy.events())[-1]
        assert (flow.request.body.size, flow.request.body.data) == (3, b"abc" if request else b"")
        assert bool(flow.response.body.data) == response and flow.response.body.size > 0


async def test_max_body_size(live: Live, upstream: Upstream) -> None:
    await live.set(max_body_size=4)
    answer = await live.curl(f"http://127.0.0.1:{upstream.port}/plain/whole")
    [flow] = flows(await live.proxy.events())
    assert flow.response.body.data == answer.body[:4] and flow.response.body.truncated


async def test_websocket_enabled(live: Live) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def talk(port: int, text: str) -> None:
        async with websockets.connect(f"ws://127.0.0.1:{port}/", proxy=live.proxy.url) as client:
            await client.send(text)
            assert await client.recv() == text

    async with serve(echo, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await live.set(websocket_enabled=False)
        await talk(port, "unseen")
        await live.set()
        await talk(port, "seen")
        found = await live.proxy.until(lambda events: len(flows(events, WebSocketMessage)) >= 3)
    texts = [event.payload for event in flows(found, WebSocketMessage) if event.message_type == "TEXT"]
    assert texts == [b"seen", b"seen"]


async def test_ip_blacklist(live: Live, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain"
    await live.set(ip_blacklist="10.0.0.0/8, 127.0.0.0/8")
    assert (await live.curl(url)).status != 200
    await live.set(ip_blacklist="10.0.0.0/8")
    assert (await live.curl(url)).status == 200
    assert len(upstream.seen) == 1
    [denied] = [event for event in flows(await live.proxy.events(), AuthAttempted) if not event.success]
    assert "ip_blacklist" in denied.failure_reason


async def test_auth_enabled_with_password_and_token(live: Live, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain"
    hasher = argon2.PasswordHasher(time_cost=1, memory_cost=1024)
    await live.set(
        auth_enabled=True,
        auth_username="ann",
        auth_password_hash=hasher.hash("pass:word"),
        auth_token_hash=hasher.hash("tok"),
    )
    assert (await live.curl(url)).status == 407
    assert (await live.curl(url, "--proxy-user", "ann:wrong")).status == 407
    assert (await live.curl(url, "--proxy-user", "bob:pass:word")).status == 407
    assert (await live.curl(url, "--proxy-user", "ann:pass:word")).status == 200
    assert (await live.curl(url, "--proxy-header", "Proxy-Authorization: Bearer tok")).status == 200
    await live.set(auth_enabled=True, auth_token_hash=hasher.hash("other"))
    assert (await live.curl(url, "--proxy-header", "Proxy-Authorization: Bearer other")).status == 200
    await live.set()
    assert (await live.curl(url)).status == 200
    assert not any(b"roxy-authorization" in head for head in upstream.seen)


async def test_connection_timeout(live: Live) -> None:
    await live.set(connection_timeout=1)  # 30 is longer than curl waits
    with full_backlog() as port:
        assert (await live.curl(f"http://127.0.0.1:{port}/")).status == 502
    [failed] = flows(await live.proxy.events(), FlowFailed)
    assert failed.failure.error_type == "TIMEOUT"


async def test_cache_enabled(live: Live) -> None:
    asked: list[bytes] = []

    async def origin(talk: Talk) -> None:
        while True:
            asked.append(await talk.head())
            head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nCache-Control: max-age=600\r\nContent-Length: 3\r\n"
            await talk.say(head + b"\r\nPNG")

    async with RawServer(origin) as server:
        url = f"http://127.0.0.1:{server.port}/logo.png"
        await live.set(cache_enabled=True)
        for _ in range(2):
            assert (await live.curl(url)).body == b"PNG"
        assert len(asked) == 1
        await live.set(cache_enabled=False)
        assert (await live.curl(url)).body == b"PNG"
        assert len(asked) == 2
    assert [flow.cached for flow in flows(await live.proxy.events())] == [False, True, False]


async def test_passthrough_hosts(live: Live, upstream_tls: Upstream, trusted: str) -> None:
    """The client sees the server's own certificate, and Megido nothing of the exchange."""
    url = f"https://localhost:{upstream_tls.port}/plain"
    own = ("--cacert", trusted)
    assert (await live.curl(url, *own)).code == 60
    await live.set(passthrough_hosts="other.example, localhost")
    assert (await live.curl(url, *own)).status == 200
    await live.set(passthrough_hosts="other.example")
    assert (await live.curl(url, *own)).code == 60
    assert (await live.curl(url)).status == 200
    assert len(flows(await live.proxy.events())) == 1


async def test_blocked_destinations(live: Live, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain"
    await live.set(blocked_destinations="127.0.0.0/8")
    assert (await live.curl(url)).status != 200 and not upstream.seen
    await live.set()
    assert (await live.curl(url)).status == 200


async def test_one_scope_over_the_other(live: Live, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain/whole"
    await live.offer("node:capture-0", max_body_size=2)
    await live.offer("app:browser", max_body_size=3, log_request_body=False)
    await live.set(max_body_size=4, log_request_body=True)
    await live.curl(url, "-d", "abc")
    [flow] = flows(await live.proxy.events())
    assert len(flow.response.body.data) == 2 and flow.request.body.data == b""
    await live.offer("node:capture-0")
    await live.offer("app:browser")
    await live.set()


async def test_body_rules_change_bodies_of_unknown_length_up_to_the_cap(live: Live, upstream: Upstream) -> None:
    """Larger ones arrive as they were sent."""
    url = f"http://127.0.0.1:{upstream.port}/echo"
    await live.set(a_rule("body", "added", "1"), a_rule("header", "X-Rule", "2", number=2))
    kind = ("-H", "Content-Type: application/json")
    chunked = (*kind, "-H", "Transfer-Encoding: chunked")
    answer = await live.curl(url, *chunked, "-d", '{"a": 1}')
    assert answer.body.endswith(b'{"a": 1,"added":"1"}') and b"X-Rule: 2" in answer.body
    large = live.proxy.data_dir / "large.json"
    large.write_bytes(b'{"a": "' + b"x" * BODY_CAP + b'"}')
    for headers in (chunked, kind):
        answer = await live.curl(url, *headers, "-H", "Expect:", "--data-binary", f"@{large}")
        assert answer.body.endswith(b"\r\n\r\n" + large.read_bytes())
    found = flows(await live.proxy.until(lambda events: len(flows(events)) == 3))
    assert [set(flow.rules) for flow in found] == [{1, 2}, {2}, {2}]
    assert harness.body(await live.proxy.events(), found[0], "request") == b'{"a": 1,"added":"1"}'
    await live.status(lambda status: status.counters.get("rule_skipped:1") == 2)


async def test_body_rules_change_uploads_over_http2(live: Live, upstream_tls: Upstream) -> None:
    """Without a length, as it may be there."""
    await live.set(a_rule("body", "added", "1", pattern="/count"))
    sent = ("--http2", "-H", "Content-Type: application/json", "-H", "Transfer-Encoding: chunked", "-d", '{"a":1}')
    answer = await live.curl(f"https://localhost:{upstream_tls.port}/count", *sent)
    assert answer.body == str(len('{"a":1,"added":"1"}')).encode()
    [flow] = flows(await live.proxy.until(lambda events: bool(flows(events))))
    assert flow.rules == (1,) and flow.request.http_version == "HTTP/2.0"
    assert harness.body(await live.proxy.events(), flow, "request") == b'{"a":1,"added":"1"}'


async def test_what_this_node_cannot_apply_is_refused_whole_and_reported(live: Live, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/echo"
    await live.set(a_rule("header", "X-Kept", "1"), max_body_size=7)
    kept = live.versions[0]
    await live.offer("global", a_rule("header", "X-New", "1"), max_body_size=8, ip_whitelist="nonsense")
    status = await live.status(lambda status: bool(status.config_error))
    assert status.config_version == kept
    assert f"version {kept + 1}" in status.config_error and "nonsense" in status.config_error
    answer = await live.curl(url)
    assert b"X-Kept" in answer.body and b"X-New" not in answer.body
    assert len(flows(await live.proxy.events())[-1].response.body.data) == 7
    await live.set()


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        (("--mode", "socks5"), {"auth_enabled": True, "auth_token_hash": "$argon2id$x"}, "socks5"),
        ((), {"auth_enabled": True}, "nothing to compare with"),
    ],
)
async def test_what_would_be_dangerous_here_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, Any], says: str
) -> None:
    async with capture(tmp_path / "data", *arguments) as proxy:
        live = Live(proxy)
        await live.offer("global", **settings)
        status = await live.status(lambda status: bool(status.config_error))
        assert says in status.config_error and status.config_version == 0


async def test_what_the_start_decided_is_pinned(tmp_path: Path, upstream: Upstream) -> None:
    given = ("--max-body-size", "5", "--set", "websocket_max_message=2000", "--ssl-insecure", "--log-request-body")
    async with capture(tmp_path / "data", *given, PROXY_AUTH_TOKEN="secret-of-the-start") as proxy:
        live = Live(proxy)
        await live.set(max_body_size=3, log_request_body=False, log_response_body=False)
        await live.curl(f"http://127.0.0.1:{upstream.port}/plain", "-d", "12345678")
        [flow] = flows(await proxy.events())
        status = await live.status(lambda status: True)
    assert flow.request.body.data == b"12345" and flow.response.body.data == b""
    assert status.pinned == {
        "max_body_size": "5",
        "websocket_max_message": "2000",
        "log_request_body": "true",  # its default, but given
        "auth_token": "set",
        "ssl_insecure": "true",
    }
    assert any("ssl_insecure" in line for line in proxy.output)


async def test_the_copy_on_disk_serves_a_start_without_bus_and_api(tmp_path: Path, upstream: Upstream) -> None:
    """The first client already: nothing of the proxy's start is waited for but its listening."""
    data_dir = tmp_path / "data"
    url = f"http://127.0.0.1:{upstream.port}/echo"
    away = ("--api-url", "http://127.0.0.1:1")
    async with capture(data_dir, *away) as proxy:
        await Live(proxy, [6]).set(a_rule("header", "X-Kept", "1"), max_body_size=4)
    shutil.rmtree(data_dir / "config")
    async with capture(data_dir, *away) as proxy:
        assert b"X-Kept: 1" in (await curl(proxy, url)).body
        [flow] = flows(await proxy.events())
        assert len(flow.response.body.data) == 4
        assert (await Live(proxy).status(lambda status: True)).config_version == 7
        # A bus that is new begins with low versions again; what is on it counts.
        live = Live(proxy, [0])
        await live.set(max_body_size=6)
        await curl(proxy, url)
        assert len(flows(await proxy.events())[-1].response.body.data) == 6


@contextlib.asynccontextmanager
async def started_with_a_damaged_copy(data_dir: Path, **settings: Any) -> AsyncIterator[Live]:
    away = ("--api-url", "http://127.0.0.1:1")
    async with capture(data_dir, *away) as proxy:
        await Live(proxy).set(**settings)
    shutil.rmtree(data_dir / "config")
    copy = data_dir / "last-known-good" / "capture-0"
    raw = bytearray(copy.read_bytes())
    raw[-5] ^= 1
    copy.write_bytes(raw)
    async with capture(data_dir, *away) as proxy:
        yield Live(proxy, [5])


async def test_a_damaged_copy_closes_a_proxy_that_was_guarded(tmp_path: Path, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/plain"
    async with started_with_a_damaged_copy(tmp_path / "data", ip_blacklist="10.0.0.0/8") as live:
        assert (await live.curl(url)).status == 0 and not upstream.seen
        status = await live.status(lambda status: bool(status.config_error))
        assert "cannot be read" in status.config_error
        await live.status(lambda status: status.counters.get("gate_refused", 0) >= 1)
        await live.set(ip_blacklist="10.0.0.0/8")
        assert (await live.curl(url)).status == 200


async def test_a_damaged_copy_that_guarded_nothing_is_as_none(tmp_path: Path, upstream: Upstream) -> None:
    async with started_with_a_damaged_copy(tmp_path / "data", max_body_size=1) as live:
        assert (await live.curl(f"http://127.0.0.1:{upstream.port}/plain")).status == 200
        assert "cannot be read" in (await live.status(lambda status: bool(status.config_error))).config_error


async def test_stale_when_nothing_can_be_read(tmp_path: Path) -> None:
    async with capture(tmp_path / "data", "--api-url", "http://127.0.0.1:1", "--cache-ttl", "1") as proxy:
        await Live(proxy).status(lambda status: status.config_stale)
        assert await asyncio.to_thread(proxy.stop) == 0
