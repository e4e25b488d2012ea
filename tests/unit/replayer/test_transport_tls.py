"""TLS towards the target: verified unless told otherwise, name and address kept apart."""

import ssl

import pytest
import trustme

from megido_replayer.transport import Origin, RawRequest, Sender, SendError, TlsContexts
from megido_shared.errors import ConfigurationError
from megido_shared.events import ErrorType
from tests.support.raw_server import OK, RawServer

GET = RawRequest(b"GET", b"/", [(b"Host", b"target.test")])


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    made = Sender(TlsContexts(path))
    yield made
    made.close()


def context(authority, *names, **changes):
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(made)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def to(server, **changes):
    fields = {"scheme": "https", "host": "target.test", "port": server.port, "addresses": ("127.0.0.1",)}
    return Origin(**(fields | changes))


async def answering(talk):
    while True:
        await talk.head()
        await talk.say(OK)


async def test_name_and_certificate_belong_to_the_host_not_to_the_pinned_address(trusted, authority):
    asked = []
    tls = context(authority, "target.test")
    tls.sni_callback = lambda _, name, __: asked.append(name)
    async with RawServer(answering, tls=tls) as server:
        got = await trusted.send(GET, to(server))
        again = await trusted.send(GET, to(server))
    assert asked == ["target.test"]
    assert (got.status, again.reused) == (200, True)
    assert (got.server.ip, got.server.tls, got.server.sni) == ("127.0.0.1", "TLSv1.3", "target.test")
    assert got.timing.tls_us > 0
    assert again.timing.tls_us == -1
    assert server.received[0].count(b"Host: target.test") == 2


async def test_the_original_sni_wins_over_the_host(trusted, authority):
    async with RawServer(answering, tls=context(authority, "front.test")) as server:
        got = await trusted.send(GET, to(server, host="127.0.0.1", sni="front.test"))
    assert got.server.sni == "front.test"


@pytest.mark.parametrize(("names", "host"), [(("other.test",), "target.test"), (("127.0.0.1",), "target.test")])
async def test_another_name_in_the_certificate_is_refused(trusted, authority, names, host):
    async with RawServer(answering, tls=context(authority, *names)) as server:
        with pytest.raises(SendError, match="certificate not accepted") as raised:
            await trusted.send(GET, to(server, host=host))
        assert (raised.value.error_type, raised.value.sent) == (ErrorType.SSL_ERROR, False)
        assert server.received in ([], [b""])


async def test_an_unknown_authority_is_refused_by_default_and_taken_when_asked(authority):
    sender = Sender()
    async with RawServer(answering, tls=context(authority, "other.test")) as server:
        with pytest.raises(SendError) as raised:
            await sender.send(GET, to(server))
        assert raised.value.error_type is ErrorType.SSL_ERROR
        assert (await sender.send(GET, to(server, verify=False))).status == 200
        with pytest.raises(SendError):  # the connection that was not verified is not used for it
            await sender.send(GET, to(server))
    sender.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_old_protocols_only_without_verification(trusted, authority):
    old = context(authority, "target.test", minimum_version=ssl.TLSVersion.TLSv1)
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with RawServer(answering, tls=old) as server:
        with pytest.raises(SendError, match="handshake"):
            await trusted.send(GET, to(server))
        assert (await trusted.send(GET, to(server, verify=False))).server.tls == "TLSv1.1"


async def test_plain_http_behind_https_is_an_ssl_error(trusted):
    async def script(talk):
        await talk.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await talk.rest()

    async with RawServer(script) as server:
        with pytest.raises(SendError, match=r"TLS handshake with target\.test") as raised:
            await trusted.send(GET, to(server))
    assert raised.value.error_type is ErrorType.SSL_ERROR


async def test_a_handshake_that_never_ends_times_out():
    async def script(talk):
        await talk.rest()

    sender = Sender(connect_timeout_s=0.3)
    async with RawServer(script) as server:
        with pytest.raises(SendError, match="TLS handshake") as raised:
            await sender.send(GET, to(server))
    assert (raised.value.error_type, raised.value.sent) == (ErrorType.TIMEOUT, False)


async def test_a_handshake_that_is_cut_is_a_reset():
    async def script(talk):
        await talk.exactly(5)
        talk.reset()

    sender = Sender()
    async with RawServer(script) as server:
        with pytest.raises(SendError) as raised:
            await sender.send(GET, to(server))
    assert raised.value.error_type is ErrorType.CONNECTION_RESET


def test_authorities_that_cannot_be_read_are_a_clear_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        TlsContexts(tmp_path / "missing.pem").get(True)
