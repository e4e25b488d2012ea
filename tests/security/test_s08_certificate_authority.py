"""Line 8: the authority's key is for its owner, stays the same, is shared, and is told to nobody."""

import asyncio
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key, pkcs12

from megido_capture.authority import KEYS, ensure
from tests.integration.capture.harness import Proxy, capture, curl, start
from tests.integration.capture.upstream import Upstream

pytestmark = pytest.mark.timeout(120)


def fingerprint(proxy: Proxy) -> bytes:
    return x509.load_pem_x509_certificate(proxy.ca.read_bytes()).fingerprint(hashes.SHA256())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_modes_and_a_fingerprint_that_stays(tmp_path: Path) -> None:
    found = set[bytes]()
    for _ in range(2):
        async with capture(tmp_path) as proxy:
            found.add(fingerprint(proxy))
            assert mode(tmp_path / "ca") == 0o700
            assert all(mode(tmp_path / "ca" / name) == 0o600 for name in KEYS)
            load_pem_private_key((tmp_path / "ca" / KEYS[0]).read_bytes(), None)
    assert len(found) == 1


def test_a_directory_that_was_too_open_is_closed(tmp_path: Path) -> None:
    ensure(tmp_path / "ca")
    (tmp_path / "ca").chmod(0o755)
    (tmp_path / "ca" / KEYS[0]).chmod(0o644)
    ensure(tmp_path / "ca")
    assert mode(tmp_path / "ca") == 0o700 and mode(tmp_path / "ca" / KEYS[0]) == 0o600


async def test_nodes_that_start_at_the_same_time_share_one(
    tmp_path: Path, upstream_tls: Upstream, trusted: str
) -> None:
    given = ("--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    nodes = await asyncio.gather(*(asyncio.to_thread(start, tmp_path, *given) for _ in range(3)))
    try:
        key = (tmp_path / "ca" / KEYS[0]).read_bytes()
        certificate = nodes[0].ca.read_bytes()
        assert certificate in key  # the pair belongs together
        for node in nodes:
            assert (await curl(node, "http://mitm.it/cert/pem")).body == certificate
            answer = await curl(node, f"https://localhost:{upstream_tls.port}/plain")  # trusts that file alone
            assert (answer.code, answer.status) == (0, 200)
    finally:
        for node in nodes:
            await asyncio.to_thread(node.stop)


async def test_the_key_is_nowhere_else(tmp_path: Path, upstream: Upstream) -> None:
    async with capture(tmp_path) as proxy:
        await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")
        key = (tmp_path / "ca" / KEYS[0]).read_text().partition("-----BEGIN CERTIFICATE")[0]
        lines = [line for line in key.splitlines() if "-----" not in line and len(line) > 40]
        for path in ("pem", "cer", "p12", "../mitmproxy-ca.pem", "..%2Fmitmproxy-ca.pem", "pem/../../mitmproxy-ca.p12"):
            answer = await curl(proxy, f"http://mitm.it/cert/{path}", "--path-as-is")
            assert lines[3].encode() not in answer.body and b"PRIVATE" not in answer.body
            assert (answer.status == 200) is (len(path) == 3)
            if path == "p12":
                assert pkcs12.load_key_and_certificates(answer.body, None)[0] is None
    assert not [line for line in proxy.output if "PRIVATE" in line or lines[3] in line]
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name not in KEYS:
            content = file.read_bytes()
            assert b"PRIVATE KEY" not in content and lines[3].encode() not in content, file
