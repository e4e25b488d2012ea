"""Conversion, in tables: no proxy, no clock."""

from hashlib import sha256

import pytest
from mitmproxy.http import Headers
from mitmproxy.test import tflow

from megido_capture.recording import flows
from megido_shared.events import EMPTY_BODY, Body, unpack_headers


def test_request_is_taken_as_bytes() -> None:
    raw = tflow.tflow().request
    raw.data.method, raw.data.path, raw.data.scheme = b"G\xc3T", b"/a%20\xff?q=\x80", b"https"
    raw.data.headers = Headers([(b"X-A", b"\xff\x00"), (b"x-a", b"2"), (b"HOST", b"h")])
    made = flows.request_of(raw, EMPTY_BODY)
    assert (made.method, made.target, made.scheme) == (b"G\xc3T", b"/a%20\xff?q=\x80", "https")
    assert unpack_headers(made.headers) == [(b"X-A", b"\xff\x00"), (b"x-a", b"2"), (b"HOST", b"h")]


@pytest.mark.parametrize("name", [b"Proxy-Authorization", b"proxy-authorization", b"PROXY-AUTHORIZATION"])
def test_proxy_credentials_are_never_part_of_it(name: bytes) -> None:
    raw = tflow.tflow().request
    raw.data.headers = Headers([(b"A", b"1"), (name, b"Basic c2VjcmV0"), (b"B", b"2"), (name, b"again")])
    assert unpack_headers(flows.request_of(raw, EMPTY_BODY).headers) == [(b"A", b"1"), (b"B", b"2")]


@pytest.mark.parametrize(
    ("content", "cap", "expected"),
    [
        (None, 5, EMPTY_BODY),
        (b"", 5, EMPTY_BODY),
        (b"12345", 5, Body(data=b"12345", size=5)),
        (b"123456", 5, Body(data=b"12345", size=6, sha256=sha256(b"123456").digest(), truncated=True)),
        (b"1", 0, Body(data=b"", size=1, sha256=sha256(b"1").digest(), truncated=True)),
    ],
)
def test_body_is_capped_and_its_size_true(content: bytes | None, cap: int, expected: Body) -> None:
    assert flows.body_of(content, cap) == expected


def test_response_keeps_its_coding() -> None:
    raw = tflow.tflow(resp=True).response
    assert raw is not None
    raw.data.headers = Headers([(b"Content-Encoding", b"gzip")])
    raw.data.content = b"not really gzip"
    made = flows.response_of(raw, flows.body_of(raw.data.content, 100))
    assert (made.status, made.reason, made.body.data) == (200, b"OK", b"not really gzip")


@pytest.mark.parametrize(
    ("scheme", "fields", "expected"),
    [
        (b"http", [], "http"),
        (b"https", [], "https"),
        (b"http", [(b"Upgrade", b"websocket"), (b"Sec-WebSocket-Key", b"x")], "ws"),
        (b"https", [(b"upgrade", b"WebSocket"), (b"sec-websocket-key", b"x")], "wss"),
        (b"https", [(b"Upgrade", b"h2c"), (b"Sec-WebSocket-Key", b"x")], "https"),
        (b"http", [(b"Upgrade", b"websocket")], "http"),
    ],
)
def test_scheme(scheme: bytes, fields: list[tuple[bytes, bytes]], expected: str) -> None:
    raw = tflow.tflow().request
    raw.data.scheme, raw.data.headers = scheme, Headers(fields)
    assert flows.scheme_of(raw) == expected


@pytest.mark.parametrize(
    ("scheme", "host", "port", "target", "expected"),
    [
        ("http", "h", 80, b"/", "http://h/"),
        ("https", "h", 443, b"/a?b", "https://h/a?b"),
        ("https", "h", 8443, b"/", "https://h:8443/"),
        ("wss", "h", 443, b"/", "wss://h/"),
        ("http", "::1", 80, b"/", "http://[::1]/"),
        ("http", "h", 80, b"*", "http://h/*"),
        ("http", "h", 80, b"/\xff", "http://h/\\udcff"),
    ],
)
def test_url(scheme: str, host: str, port: int, target: bytes, expected: str) -> None:
    assert flows.url_from(scheme, host, port, target) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("fe80::1%eth0", "fe80::1"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_addresses(address: str, expected: str) -> None:
    assert flows.plain_ip(address) == expected


def test_peers() -> None:
    flow = tflow.tflow()
    flow.client_conn.peername, flow.client_conn.tls_version = ("::ffff:9.9.9.9", 5), "TLSv1.3"
    flow.client_conn.alpn, flow.client_conn.sni = b"h2", "name"
    peer = flows.client_peer(flow.client_conn)
    assert (peer.ip, peer.port, peer.tls, peer.alpn, peer.sni) == ("9.9.9.9", 5, "TLSv1.3", "h2", "name")
    flow.server_conn.peername = None
    assert flows.server_peer(flow.server_conn).ip == ""


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], None),
        ([(b"Content-Length", b"12")], 12),
        ([(b"content-length", b"12"), (b"Transfer-Encoding", b"chunked")], None),
        ([(b"Content-Length", b"twelve")], None),
    ],
)
def test_content_length(fields: list[tuple[bytes, bytes]], expected: int | None) -> None:
    assert flows.content_length(Headers(fields)) == expected
