"""Line 9: servers have to prove who they are, unless somebody asks for less, which is said."""

import ssl
from pathlib import Path

import pytest
import trustme

from megido_shared.events import ErrorType
from tests.integration.capture.breakage import Server, certified, expired, self_signed, unknown_authority, wrong_host
from tests.integration.capture.harness import Proxy, capture, curl
from tests.support.raw_server import OK, RawServer, Talk

pytestmark = pytest.mark.timeout(90)

WRONG = {
    "expired": certified(expired),
    "for another host": certified(wrong_host),
    "of an authority nobody knows": certified(unknown_authority),
    "signed by itself": certified(self_signed),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_wrong_certificate_is_502_and_an_ssl_error(proxy: Proxy, authority: trustme.CA, what: str) -> None:
    server: Server = WRONG[what]
    async with server("h1", authority) as (host, port):
        answer = await curl(proxy, f"https://{host}:{port}/")
    assert answer.status == 502
    found = await proxy.until(bool)
    assert [event.failure.error_type for event in found if hasattr(event, "failure")] == [ErrorType.SSL_ERROR]


@pytest.mark.parametrize("how", [("--ssl-insecure",), ("--set", "ssl_insecure=true")])
async def test_less_is_said_when_it_is_asked_for(tmp_path: Path, authority: trustme.CA, how: tuple[str, ...]) -> None:
    async def answering(talk: Talk) -> None:
        await talk.head()
        await talk.say(OK)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    expired(authority).configure_cert(context)
    async with RawServer(answering, tls=context) as server, capture(tmp_path, *how) as proxy:
        answer = await curl(proxy, f"https://localhost:{server.port}/")
        assert (answer.status, answer.body) == (200, b"ok")
        assert any("ssl_insecure" in line for line in proxy.output)
