"""Line 6: the proxy leads nobody to Megido's own API, database, Kafka, metrics or itself, nor where it must not."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megido.launcher.options import UpOptions
from megido.launcher.plan import specs
from megido_capture.access.owndoor import doors_of
from megido_shared.addresses import Endpoint
from megido_shared.config_fields import Invalid, check_value
from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError
from megido_shared.events import ErrorRaised, FlowFailed
from megido_shared.hostpatterns import HostPatterns
from megido_shared.settings import METRICS_PORTS, Common
from tests.integration.capture.harness import Proxy, capture, flows, start
from tests.integration.capture.upstream import Upstream
from tests.integration.capture.upstream import serving as upstream_serving
from tests.support.inside import inside
from tests.support.raw_server import OK, RawServer, Talk

pytestmark = pytest.mark.timeout(120)

HERE = (
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "api.localhost",
    "127.1",
    "127.8.9.10",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "017700000001",
    "0177.0.0.1",
    "0.0.0.0",
    "0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:127.0.0.1]",
    socket.gethostname(),
)


@pytest.fixture(scope="module")
def api_port() -> Iterator[int]:
    """Somebody listens there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def proxy_process(tmp_path_factory: pytest.TempPathFactory, api_port: int) -> Iterator[Proxy]:
    proxy = start(tmp_path_factory.mktemp("proxy"), "--api-url", f"http://localhost:{api_port}")
    yield proxy
    assert proxy.stop() == 0


@pytest.fixture
def proxy(proxy_process: Proxy) -> Proxy:
    return proxy_process.from_now()


async def ask(port: int, target: str, *, tunnel: bool) -> bytes:
    """The whole answer, or its head when it is 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    line = f"CONNECT {target} HTTP/1.1" if tunnel else f"GET http://{target}/ HTTP/1.1"
    writer.write(f"{line}\r\nHost: {target}\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    if b" 200 " not in answer[:16]:
        length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r")[0])
        answer += await asyncio.wait_for(reader.readexactly(length), 30)
    writer.close()
    return answer


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("host", HERE)
async def test_own_api_by_every_name(proxy: Proxy, api_port: int, host: str, tunnel: bool) -> None:
    answer = await ask(proxy.port, f"{host}:{api_port}", tunnel=tunnel)
    assert answer.startswith(b"HTTP/1.1 502 ") and b"own API" in answer
    [event] = await proxy.events()
    assert isinstance(event, ErrorRaised if tunnel else FlowFailed) and "own API" in event.failure.message


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "localhost", "[::ffff:127.0.0.1]", socket.gethostname()])
async def test_own_metrics_and_the_proxy_itself(proxy: Proxy, host: str, tunnel: bool) -> None:
    for port, named in ((proxy.metrics_port, b"own metrics"), (proxy.port, b"own listener")):
        answer = await ask(proxy.port, f"{host}:{port}", tunnel=tunnel)
        assert answer.startswith(b"HTTP/1.1 502 ") and named in answer
    assert len(await proxy.events()) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize("port", METRICS_PORTS.values())
async def test_the_metrics_of_the_other_services(proxy: Proxy, host: str, port: int) -> None:
    """Where they are unless they are told otherwise, whether anything listens there or not."""
    assert b"own " in (answer := await ask(proxy.port, f"{host}:{port}", tunnel=True)) and b"'s metrics" in answer


def test_the_launcher_protects_the_ports_that_it_has_chosen(tmp_path: Path) -> None:
    """One is taken by somebody else; the database is where the user says."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # taken it is
            stack.enter_context(socket.create_server(("127.0.0.1", METRICS_PORTS["ingest"])))
        options = UpOptions.of(
            data_dir=str(tmp_path), kafka="localhost:1", database_url="postgresql://u:secret@[::1]:6432/x", env={}
        )
        made = {spec.name: spec for spec in specs(options)}
        ports = {name: made[name].probe_port() for name in METRICS_PORTS}
        assert ports["ingest"] != METRICS_PORTS["ingest"]
        proxied = made["capture"].arguments(ports["capture"])
        replayed = made["replayer"].arguments(ports["replayer"])
    chosen = f"--protect=127.0.0.1:{ports['ingest']}"
    assert chosen in proxied and chosen in replayed
    assert "--protect=[::1]:6432" in proxied and "secret" not in str(proxied)


async def test_own_database_and_what_else_is_named(tmp_path: Path, upstream: Upstream) -> None:
    async with upstream_serving() as other:
        url = f"postgresql+psycopg://megido:pass%40word@localhost:{upstream.port}/megido"
        given = ("--protect", f"127.0.0.1:{other.port}", "--protect", "127.0.0.1:9")
        async with capture(tmp_path, *given, MEGIDO_DATABASE_URL=url) as proxy:
            assert b"own database" in await ask(proxy.port, f"127.0.0.1:{upstream.port}", tunnel=False)
            assert b"own port" in await ask(proxy.port, f"localhost:{other.port}", tunnel=True)
            assert b"own port" in await ask(proxy.port, "127.1:9", tunnel=True)
    assert upstream.seen == other.seen == []


METRICS = [
    (Endpoint("localhost", 9490), "own capture's metrics"),
    (Endpoint("localhost", 9480), "own replayer's metrics"),
    (Endpoint("localhost", 9470), "own ingest's metrics"),
    (Endpoint("localhost", 9460), "own forwarder's metrics"),
]


def test_what_is_ours() -> None:
    url = "postgresql://u:p@db.example,[2001:db8::1]:6432/x?host=other.example&port=5433"
    common = Common(DataDir(Path("/nowhere")), kafka="kafka.example:9092,[::1]:9093", database_url=url)
    assert doors_of("https://api.example.org", common, "a:1,[::1]:2") == [
        (Endpoint("api.example.org", 443), "own API (api_url)"),
        (Endpoint("kafka.example", 9092), "own Kafka"),
        (Endpoint("::1", 9093), "own Kafka"),
        (Endpoint("db.example", 5433), "own database"),
        (Endpoint("2001:db8::1", 6432), "own database"),
        (Endpoint("2001:db8::1", 5433), "own database"),
        (Endpoint("other.example", 5433), "own database"),
        *METRICS,
        (Endpoint("a", 1), "own port"),
        (Endpoint("::1", 2), "own port"),
    ]
    assert doors_of("http://a", Common(DataDir(Path("/x")), database_url="postgresql:///x?host=/run/pg")) == [
        (Endpoint("a", 80), "own API (api_url)"),
        *METRICS,
    ]
    with pytest.raises(ConfigurationError, match="megido_protect"):
        doors_of("http://a", Common(DataDir(Path("/x"))), "nonsense")


class Names:
    """A name server of the test's own: each look-up takes the next of a name's answers, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: Any, *arguments: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        answers = self.answers.get(name)
        if answers:
            self.asked.append(name)
            host = answers.pop(0) if len(answers) > 1 else answers[0]
        return self._resolve(host, *arguments, **more)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.mark.parametrize("tunnel", [False, True])
async def test_a_name_of_others_that_leads_here(tmp_path: Path, upstream: Upstream, names: Names, tunnel: bool) -> None:
    names.answers = {"foreign.example": ["127.0.0.1"]}
    async with inside(tmp_path, api_url=f"http://localhost:{upstream.port}") as proxy:
        answer = await ask(proxy.port, f"Foreign.Example.:{upstream.port}", tunnel=tunnel)
        assert answer.startswith(b"HTTP/1.1 502 ") and b"own API" in answer
    assert all(b"/proxy/api/config/" in head for head in upstream.seen)  # what the node itself asks


async def test_an_own_door_elsewhere_by_its_address(tmp_path: Path, names: Names) -> None:
    names.answers = {"api.example": ["198.51.100.7"], "alias.example": ["198.51.100.7"], "other.example": ["127.0.0.1"]}
    async with inside(tmp_path, api_url="http://api.example:9") as proxy:
        for host in ("api.example", "API.example.", "198.51.100.7", "[::ffff:198.51.100.7]", "alias.example"):
            assert b"own API" in await ask(proxy.port, f"{host}:9", tunnel=True), host
        answer = await ask(proxy.port, "other.example:9", tunnel=True)
        assert b" 502 " in answer and b"own API" not in answer


@pytest.mark.parametrize("tunnel", [False, True])
async def test_a_name_server_that_changes_its_mind(tmp_path: Path, names: Names, tunnel: bool) -> None:
    """First somewhere else, for whoever checks; then here, for whoever connects. Not a byte arrives."""

    async def listening(talk: Talk) -> None:
        await talk.rest()

    async with RawServer(listening) as own, inside(tmp_path, api_url=f"http://localhost:{own.port}") as proxy:
        names.answers = {"rebinding.example": ["198.51.100.7", "127.0.0.1"]}
        answer = await ask(proxy.port, f"rebinding.example:{own.port}", tunnel=tunnel)
        assert names.asked == ["rebinding.example"] * 2
        if not tunnel:
            assert answer.startswith(b"HTTP/1.1 502 ")
        found = await proxy.until(lambda events: bool(flows(events, FlowFailed) or flows(events, ErrorRaised)))
        [event] = [*flows(found, FlowFailed), *flows(found, ErrorRaised)]
        assert "own API" in event.failure.message
    assert b"" in own.received and all(not seen or b"/proxy/api/config/" in seen for seen in own.received)


BLOCKED = "blocked.example, *.internal, 203.0.113.0/24, 127.0.0.8, 2001:db8::/32, bücher.example"


@pytest.mark.parametrize("tunnel", [False, True])
async def test_blocked_destinations(tmp_path: Path, upstream: Upstream, names: Names, tunnel: bool) -> None:
    names.answers = {"friendly.example": ["203.0.113.9"], "here.example": ["127.0.0.1"]}
    async with inside(tmp_path, blocked_destinations=BLOCKED) as proxy:
        blocked = ["blocked.example", "BLOCKED.example.", "a.internal", "a.b.INTERNAL", "203.0.113.1", "127.0.0.8"]
        blocked += ["[::ffff:203.0.113.1]", "[2002:cb00:7101::]", "[64:ff9b::cb00:7101]", "0xcb007101", "127.8"]
        blocked += ["[2001:db8:1::1]", "friendly.example", "xn--bcher-kva.example"]
        for host in blocked:
            answer = await ask(proxy.port, f"{host}:{upstream.port}", tunnel=tunnel)
            assert answer.startswith(b"HTTP/1.1 502 ") and b"blocked_destinations" in answer, host
        found = await proxy.events()
        assert len(found) == len(blocked)
        assert all("blocked_destinations" in event.failure.message for event in found)
        assert upstream.seen == []
        for host in ("127.0.0.1", "here.example"):
            assert b" 200 " in await ask(proxy.port, f"{host}:{upstream.port}", tunnel=tunnel)


async def test_blocked_from_now_on(tmp_path: Path, upstream: Upstream) -> None:
    async with inside(tmp_path) as proxy:
        assert b" 200 " in await ask(proxy.port, f"127.0.0.1:{upstream.port}", tunnel=True)
        proxy.apply(blocked_destinations=f"127.0.0.0/8:{upstream.port + 1}")
        assert b" 200 " in await ask(proxy.port, f"127.0.0.1:{upstream.port}", tunnel=True)
        proxy.apply(blocked_destinations=f"localhost:{upstream.port}")
        assert b"blocked_destinations" in await ask(proxy.port, f"localhost:{upstream.port}", tunnel=True)
        proxy.apply(blocked_destinations=f"127.0.0.0/8:{upstream.port}")
        assert b"blocked_destinations" in await ask(proxy.port, f"127.0.0.1:{upstream.port}", tunnel=True)


async def test_behind_another_proxy(tmp_path: Path) -> None:
    """That one would connect, perhaps from this very machine."""

    async def answering(talk: Talk) -> None:
        await talk.head()
        await talk.say(OK)

    async with RawServer(answering) as chained:
        given = ("--mode", f"upstream:http://127.0.0.1:{chained.port}", "--api-url", "http://localhost:8123")
        # The proxy behind is the operator's own choice, wherever it is.
        async with capture(tmp_path, *given, "--set", "blocked_destinations=127.0.0.0/8,*.internal") as proxy:
            for host in ("localhost:8123", "127.1:8123", "a.internal:80", "127.0.0.9:80"):
                for tunnel in (False, True):
                    assert b" 403 " in await ask(proxy.port, host, tunnel=tunnel), host
            assert b" 200 " in await ask(proxy.port, "example.org:80", tunnel=False)
    assert len(chained.talks) == 1


async def test_an_own_door_known_by_name_behind_another_proxy(tmp_path: Path, names: Names) -> None:
    """Nothing is connected to by whose look-up its address would be learnt."""

    async def answering(talk: Talk) -> None:
        await talk.head()
        await talk.say(OK)

    names.answers = {"api.example": ["198.51.100.7"]}
    async with RawServer(answering) as chained:
        mode = [f"upstream:http://127.0.0.1:{chained.port}"]
        async with inside(tmp_path, mode=mode, api_url="http://api.example:9") as proxy:
            for host in ("198.51.100.7", "[::ffff:198.51.100.7]", "0xc6336407", "api.example"):
                for tunnel in (True, False):
                    answer = await ask(proxy.port, f"{host}:9", tunnel=tunnel)
                    assert b" 403 " in answer and b"own API" in answer, host
            assert not chained.talks
            assert b" 200 " in await ask(proxy.port, "198.51.100.8:9", tunnel=False)
    assert len(chained.talks) == 1


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "10.0.0.1/8", "*", "*.", "a b", "-x.example", "fe80::/129"])
def test_a_bad_entry_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="no "):
        HostPatterns(f"good.example,{entry}")
    with pytest.raises(Invalid):
        check_value("blocked_destinations", f"good.example,{entry}")
