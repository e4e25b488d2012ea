"""The decision on credentials and addresses, and that doubt denies."""

from base64 import b64encode
from typing import Any

import pytest
from mitmproxy.connection import Client
from mitmproxy.test import tflow

from megido_capture.access.addresses import is_loopback
from megido_capture.access.attempts import Attempts
from megido_capture.access.authentication import Access, check_listeners
from megido_capture.access.credentials import Accepted, parse
from megido_capture.access.farewell import Farewell
from megido_capture.access.gate import AddressGate
from megido_capture.access.verifier import REMEMBERED_LET_IN, REMEMBERED_WRONG, Verifier
from megido_capture.configuration.settings import CaptureSettings, defaults_from_env
from megido_shared.errors import ConfigurationError
from megido_shared.events import AuthAttempted
from tests.unit.capture.fakes import Parts

TOKEN = "tökén:x"


def basic(text: str) -> str:
    return "Basic " + b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("given", "username", "accepted"),
    [
        (f"Bearer {TOKEN}", "", True),
        (f"bearer  {TOKEN}", "", True),
        (basic(f"anna:{TOKEN}"), "anna", True),
        (basic(f":{TOKEN}"), "", True),
        (basic(TOKEN), "tökén", False),
        (basic("anna:"), "", False),
        (basic("anna"), "", False),
        ("Basic", "", False),
        ("Basic ====", "", False),
        ("Bearer", "", False),
        ("Digest x", "", False),
        ("", "", False),
        (None, "", False),
        (b"Basic \xff".decode("latin-1"), "", False),
    ],
)
def test_a_plain_token(given: str | None, username: str, accepted: bool) -> None:
    found = parse(given)
    right = Accepted(CaptureSettings(auth_token=TOKEN)).compare(found)
    assert (found.shown, not found.problem and bool(right)) == (username, accepted)


class Broken(dict[str, Any]):
    def get(self, *_: Any) -> Any:
        raise RuntimeError("bug")


def access(parts: Parts, closed: list[bytes] | None = None, **settings: Any) -> Access:
    made = CaptureSettings(auth_required=True, auth_token=TOKEN, **settings)
    close_with = lambda client, data: (closed if closed is not None else []).append(data)  # noqa: E731
    return Access(
        Attempts(parts.emitter, parts.clock),
        parts.registry,
        parts.counters,
        made,
        close_with=close_with,
        transport=lambda client: None,
    )


@pytest.mark.parametrize("hook", ["http_connect", "requestheaders"])
def test_its_own_failure_denies(hook: str) -> None:
    parts, flow = Parts(), tflow.tflow()
    guard = access(parts)
    parts.registry.clients = Broken({flow.client_conn.id: None})
    getattr(guard, hook)(flow)
    assert flow.response is not None and flow.response.status_code == 407
    assert flow.id in parts.registry.refused and parts.counters["hook_errors:access"] == 1


def test_refused_large_upload_is_killed_and_never_streamed() -> None:
    parts, flow, closed = Parts(), tflow.tflow(), list[bytes]()
    flow.live = True
    flow.request.stream = True
    flow.request.headers["Content-Length"] = "5000000"
    access(parts, closed).requestheaders(flow)
    assert flow.error is not None and flow.response is None and flow.request.stream is False
    assert closed[0].startswith(b"HTTP/1.1 407 ") and closed[0].count(b"Proxy-Authenticate") == 2
    parts.recorder.open(flow)
    [event] = parts.journal.records
    assert isinstance(event, AuthAttempted) and not event.success and not parts.registry.flows


def test_a_refused_tunnel_that_was_cut_is_not_remembered() -> None:
    parts, flow, closed = Parts(), tflow.tflow(), list[bytes]()
    flow.live = True
    flow.request.headers["Content-Length"] = "5000000"
    access(parts, closed).http_connect(flow)
    assert flow.error is not None and closed and not parts.registry.refused


def test_guesses_of_ipv6_count_by_the_network_of_a_client() -> None:
    guard = access(Parts())

    def guess(ip: str, token: str) -> int:
        flow = tflow.tflow()
        flow.client_conn.peername = (ip, 5000, 0, 0)
        flow.request.headers["Proxy-Authorization"] = f"Bearer {token}"
        guard.requestheaders(flow)
        return flow.response.status_code if flow.response is not None else 200

    assert [guess(f"2001:db8::{number}", str(number)) for number in range(7)] == [407] * 5 + [429] * 2
    assert guess("2001:db8::ffff", "right") == 429 and guess("2001:db8:0:1::1", "x") == 407
    assert [guess("::ffff:192.0.2.1", f"a{number}") for number in range(5)] == [407] * 5
    assert guess("192.0.2.1", "y") == 429


def test_who_was_let_in_is_remembered_in_bounds() -> None:
    verifier = Verifier(Accepted(CaptureSettings(auth_token=TOKEN)))
    for number in range(REMEMBERED_LET_IN + 100):
        outcome = verifier.at_once(parse(f"Bearer {TOKEN}"), str(number))
        assert outcome is not None and outcome.identity
    assert len(verifier._let_in) == REMEMBERED_LET_IN
    for number in range(REMEMBERED_WRONG + 100):
        verifier.at_once(parse(f"Bearer {number}"), str(number))
    assert len(verifier._wrong) == REMEMBERED_WRONG


@pytest.mark.parametrize(
    ("peer", "served"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False), ("::ffff:10.0.0.1", False)],
)
async def test_only_this_machine_while_nobody_named_a_host(peer: str, served: bool) -> None:
    parts = Parts()
    guard = AddressGate(
        Attempts(parts.emitter, parts.clock),
        parts.registry,
        parts.counters,
        CaptureSettings(),
        farewell=Farewell(lambda client: None),
        loopback_only=True,
    )
    client = Client(peername=(peer, 1), sockname=("", 0))
    if (saying := guard.client_connected(client)) is not None:
        await saying
    assert (client.error is None) is served


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")),
        *((host, False) for host in ("0.0.0.0", "::", "example.org", "10.0.0.1", "")),
    ],
)
def test_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("modes", "host", "auth", "refused"),
    [
        (["regular"], "127.0.0.1", False, False),
        (["regular"], "", False, False),
        (["regular"], "0.0.0.0", False, True),
        (["regular"], "0.0.0.0", True, False),
        (["regular@10.0.0.1:8080"], "127.0.0.1", False, True),
        (["reverse:http://h@127.0.0.1:1"], "", True, True),
        (["upstream:http://h:1"], "::1", True, False),
        (["wireguard"], "0.0.0.0", False, False),
    ],
)
def test_listeners(modes: list[str], host: str, auth: bool, refused: bool) -> None:
    settings = CaptureSettings(auth_required=auth, auth_token="t")
    if refused:
        with pytest.raises(ConfigurationError):
            check_listeners(settings, modes, host)
    else:
        check_listeners(settings, modes, host)


def test_settings_from_the_environment() -> None:
    env = {"PROXY_API_URL": "http://x", "PROXY_AUTH_TOKEN": "t", "PROXY_MAX_BODY_SIZE": "7", "PROXY_LOG_DIR": "/x"}
    assert defaults_from_env(env) == {"api_url": "http://x", "auth_token": "t", "max_body_size": 7}
    assert defaults_from_env({"PROXY_MAX_BODY_SIZE": ""}) == {}
    with pytest.raises(ConfigurationError, match="PROXY_MAX_BODY_SIZE"):
        defaults_from_env({"PROXY_MAX_BODY_SIZE": "1 MB"})
