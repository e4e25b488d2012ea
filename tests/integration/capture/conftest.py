"""A proxy and upstream servers for each test; certificates by trustme."""

import ssl
from collections.abc import AsyncIterator, Iterator

import pytest
import trustme

from tests.integration.capture import harness
from tests.integration.capture.upstream import Upstream, serving


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def trusted(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with the upstreams' certificate authority."""
    path = tmp_path_factory.mktemp("upstream") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def server_context(authority: trustme.CA, *names: str, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with serving() as found:
        yield found


@pytest.fixture
async def upstream_tls(authority: trustme.CA) -> AsyncIterator[Upstream]:
    async with serving(server_context(authority, "localhost", "127.0.0.1", alpn=("h2", "http/1.1"))) as found:
        yield found


@pytest.fixture(scope="session")
def proxy_process(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[harness.Proxy]:
    """One for all tests that need no settings of their own: each looks only at what happened in it."""
    option = f"ssl_verify_upstream_trusted_ca={trusted}"
    found = harness.start(tmp_path_factory.mktemp("proxy"), "--set", option, "--connection-timeout", "2")
    yield found
    assert found.stop() == 0


@pytest.fixture
def proxy(proxy_process: harness.Proxy) -> harness.Proxy:
    return proxy_process.from_now()
