"""One running `megido up` a bus, shared by all tests; each test uses paths of its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from scripts.kafka import Node

from tests.e2e.stack import Stack
from tests.fixtures.kafka import started
from tests.support.site import H2Site, Site


@pytest.fixture(scope="session")
def upstream_ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def upstream_ca_file(upstream_ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upstream") / "ca.pem"
    upstream_ca.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="session")
def site(upstream_ca: trustme.CA) -> Iterator[Site]:
    site = Site(upstream_ca)
    yield site
    site.close()


@pytest.fixture(scope="session")
def h2_site(upstream_ca: trustme.CA) -> Iterator[H2Site]:
    site = H2Site(upstream_ca)
    yield site
    site.close()


@pytest.fixture(scope="session")
def untrusted_site() -> Iterator[Site]:
    """Its certificate is from an authority that nobody trusts."""
    site = Site(trustme.CA())
    yield site
    site.close()


@pytest.fixture(scope="package")
def stacks_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node of its own: the services' consumer groups have fixed names, two stacks must not share them."""
    if address := os.environ.get("MEGIDO_TEST_KAFKA"):
        yield address
        return
    node = Node(tmp_path_factory.mktemp("kafka"))
    try:
        yield started(node).bootstrap
    finally:
        node.kill()


@pytest.fixture(scope="package", params=["local", pytest.param("kafka", marks=pytest.mark.kafka)])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, upstream_ca_file: Path
) -> Iterator[Stack]:
    kafka = request.getfixturevalue("stacks_kafka") if request.param == "kafka" else ""
    options = ["--connection-timeout", "2", "--set", f"ssl_verify_upstream_trusted_ca={upstream_ca_file}"]
    stack = Stack(tmp_path_factory.mktemp(f"up-{request.param}"), kafka=kafka, options=options)
    try:
        stack.start()
        yield stack
        assert stack.stop() == 0, stack.screen()
    finally:
        stack.kill()
