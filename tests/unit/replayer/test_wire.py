"""What goes onto the wire: table of requests and the exact bytes."""

import pytest

from megido_replayer.transport import RawRequest, Unsendable
from megido_replayer.transport.wire import render


def request(**changes):
    fields = {"method": b"GET", "target": b"/", "headers": [(b"Host", b"h")]}
    return RawRequest(**(fields | changes))


@pytest.mark.parametrize(
    ("asked", "data"),
    [
        (request(), b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"),
        (
            request(
                method=b"pRoPfInD",
                target=b"/a//b/../%7e%zz?q=%00&q&&=#\xff\xfe",
                headers=[(b"x-B", b"1"), (b"hOsT", b"H"), (b"X-b", b""), (b"x-B", b"  1\xe9\x01")],
            ),
            b"pRoPfInD /a//b/../%7e%zz?q=%00&q&&=#\xff\xfe HTTP/1.1\r\n"
            b"x-B: 1\r\nhOsT: H\r\nX-b: \r\nx-B:   1\xe9\x01\r\n\r\n",
        ),
        (request(target=b"*", method=b"OPTIONS"), b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n"),
        (request(http_version="HTTP/1.0", headers=[]), b"GET / HTTP/1.0\r\n\r\n"),
        (
            request(method=b"POST", headers=[(b"content-LENGTH", b"3"), (b"Host", b"h")], body=b"a\0\xff"),
            b"POST / HTTP/1.1\r\ncontent-LENGTH: 3\r\nHost: h\r\n\r\na\0\xff",
        ),
        (
            request(headers=[(b"Content-Length", b"0"), (b"Expect", b"100-continue"), (b"Connection", b"close")]),
            b"GET / HTTP/1.1\r\nContent-Length: 0\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n",
        ),
        (
            request(headers=[(b"Content-Length", b"1"), (b"Content-Length", b"1")], body=b"x"),
            b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        ),
        (
            request(headers=[(b"Transfer-Encoding", b"chunked")]),
            b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
    ],
)
def test_bytes_that_are_kept(asked, data):
    made = render(asked)
    assert made.data == data
    assert made.deviations == ()


@pytest.mark.parametrize(
    ("asked", "data", "deviation"),
    [
        (
            request(method=b"PUT", headers=[(b"A", b"1"), (b"CONTENT-length", b"5"), (b"B", b"2")], body=b"1234567"),
            b"PUT / HTTP/1.1\r\nA: 1\r\nCONTENT-length: 7\r\nB: 2\r\n\r\n1234567",
            "content-length: corrected from 5 to 7",
        ),
        (
            request(headers=[(b"Content-Length", b"9"), (b"A", b"1"), (b"content-length", b"1")], body=b"x"),
            b"GET / HTTP/1.1\r\nContent-Length: 1\r\nA: 1\r\n\r\nx",
            "content-length: corrected from 9, 1 to 1",
        ),
        (
            request(headers=[(b"A", b"1")], body=b"xyz"),
            b"GET / HTTP/1.1\r\nA: 1\r\nContent-Length: 3\r\n\r\nxyz",
            "content-length: added, the body has 3 bytes",
        ),
        (
            request(headers=[(b"transfer-encoding", b"gzip, Chunked"), (b"Host", b"h")], body=b"x" * 17),
            b"GET / HTTP/1.1\r\ntransfer-encoding: gzip, Chunked\r\nHost: h\r\n\r\n11\r\n"
            + b"x" * 17
            + b"\r\n0\r\n\r\n",
            "transfer-encoding: chunk sizes are not recorded, the body is one chunk",
        ),
        (
            request(headers=[(b"Content-Length", b"4"), (b"Transfer-Encoding", b"chunked")]),
            b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "content-length: not sent beside Transfer-Encoding",
        ),
        (
            request(headers=[(b"Proxy-Authorization", b"Basic secret"), (b"A", b"1")]),
            b"GET / HTTP/1.1\r\nA: 1\r\n\r\n",
            "proxy-authorization: not sent, it is meant for a proxy",
        ),
        (
            request(headers=[(b"pROXY-connection", b"Keep-Alive")]),
            b"GET / HTTP/1.1\r\n\r\n",
            "proxy-connection: not sent, it is meant for a proxy",
        ),
        (request(target=b"", headers=[]), b"GET / HTTP/1.1\r\n\r\n", "target: empty, sent as /"),
        (
            request(target=b"/a b\r\nX: 1", headers=[]),
            b"GET /a%20b%0D%0AX:%201 HTTP/1.1\r\n\r\n",
            "target: spaces and control characters percent-encoded",
        ),
        (
            request(headers=[], trailers=[(b"T", b"1")]),
            b"GET / HTTP/1.1\r\n\r\n",
            "trailers: left out, the body is not chunked",
        ),
    ],
)
def test_deviations_are_made_where_needed_and_told(asked, data, deviation):
    made = render(asked)
    assert made.data == data
    assert made.deviations == (deviation,)


def test_trailers_follow_a_chunked_body():
    made = render(request(headers=[(b"Transfer-Encoding", b"chunked")], body=b"abc", trailers=[(b"Sum", b"1")]))
    assert made.data.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\nSum: 1\r\n\r\n")
    assert made.trailers == [(b"Sum", b"1")]


@pytest.mark.parametrize(
    "asked",
    [
        request(headers=[(b"A", b"1\r\nB: 2")]),
        request(headers=[(b"A", b"1\nB: 2")]),
        request(headers=[(b"A\r", b"1")]),
        request(headers=[(b"A", b"\0")]),
        request(headers=[(b"A\r\nB", b"\r"), (b"C", b"\n")]),
        request(headers=[(b"", b"1")]),
        request(headers=[(b":path", b"/")]),
        request(method=b""),
        request(method=b"GET /x HTTP/1.1\r\nHost:"),
        request(headers=[(b"Transfer-Encoding", b"gzip")], body=b"x"),
        request(headers=[(b"Transfer-Encoding", b"chunked, identity")], body=b"x"),
        request(http_version="HTTP/2.0"),
        request(headers=[(b"Transfer-Encoding", b"chunked")], trailers=[(b"T", b"1\r\n\r\nGET / HTTP/1.1")]),
    ],
)
def test_what_would_become_another_request_is_refused(asked):
    with pytest.raises(Unsendable):
        render(asked)


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        ("HTTP/1.1", None, True),
        ("HTTP/1.1", b"close", False),
        ("HTTP/1.1", b"TE, Close", False),
        ("HTTP/1.0", None, False),
        ("HTTP/1.0", b"Keep-Alive", True),
    ],
)
def test_whether_the_connection_may_be_used_again(version, connection, kept):
    headers = [] if connection is None else [(b"Connection", connection)]
    assert render(request(http_version=version, headers=headers)).keep_alive is kept
