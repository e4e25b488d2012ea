"""The guard of heads: what it counts, what it leaves, and how it is taken out again."""

import pytest
from h11._receivebuffer import ReceiveBuffer
from mitmproxy import connection
from mitmproxy.proxy.layers.http import _http1, _http2
from mitmproxy.test import tflow, tutils

from megido_capture.mitm import headguard
from megido_capture.mitm.headguard import MAX_BYTES, MAX_FIELDS, fields_excess, head_excess
from megido_capture.recording.emitter import MAX_INLINE
from tests.unit.capture.fakes import Parts

PATCHED = (
    (_http1.Http1Server, "read_headers"),
    (_http1.Http1Client, "read_headers"),
    (_http1.Http1Connection, "read_body"),
    (_http1.Http1Connection, "wait"),
    (_http2.Http2Connection, "__init__"),
    (_http2.Http2Server, "handle_h2_event"),
    (_http2.Http2Client, "handle_h2_event"),
)


class Observer:
    def refused_head(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        raise AssertionError

    def unfinished_head(self, conn: connection.Client, target: tuple[str, int] | None, *, left: bool) -> None:
        raise AssertionError

    def broken_request(self, conn: connection.Client, message: str) -> None:
        raise AssertionError


def buffer(data: bytes) -> ReceiveBuffer:
    made = ReceiveBuffer()
    made += data
    return made


def head(*, fields: int = 1, size: int = 0, end: bytes = b"\r\n") -> bytes:
    text = b"GET / HTTP/1.1" + end + (b"a:1" + end) * (fields - 1) + b"b:"
    return text + b"x" * (size - len(text) - 2 * len(end)) + end * 2


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_the_caps_themselves_pass(end: bytes) -> None:
    body = b"\n" * (2 * MAX_BYTES)
    for text in (head(fields=MAX_FIELDS, end=end), head(size=MAX_BYTES, end=end)):
        assert head_excess(buffer(text)) == "" and head_excess(buffer(text + body)) == ""
    assert "fields" in head_excess(buffer(head(fields=MAX_FIELDS + 1, end=end)))
    assert "bytes" in head_excess(buffer(head(size=MAX_BYTES + 1, end=end)))


def test_a_head_that_is_not_whole_yet() -> None:
    assert head_excess(buffer(b"x" * MAX_BYTES)) == ""
    assert "bytes" in head_excess(buffer(b"x" * (MAX_BYTES + 1)))


def test_empty_lines_ahead_are_dropped() -> None:
    found = buffer(b"\r\n" * MAX_BYTES + head())
    assert head_excess(found) == "" and bytes(found) == head()
    found = buffer(b"\n" * (2 * MAX_BYTES))
    assert head_excess(found) == "" and len(found) == 0


def test_decoded_fields() -> None:
    pseudo = [(b":method", b"GET"), (b":path", b"/")]
    assert fields_excess([*pseudo, *[(b"a", b"1")] * MAX_FIELDS]) == ""
    assert "fields" in fields_excess([*pseudo, *[(b"a", b"1")] * (MAX_FIELDS + 1)])
    assert fields_excess([(b"a", b"x" * (MAX_BYTES - 5))]) == ""
    assert "bytes" in fields_excess([(b"a", b"x" * (MAX_BYTES - 4))])


def test_taken_out_as_it_was() -> None:
    headguard.stop_guarding()  # a node of another test may have left it
    before = [vars(owner)[name] for owner, name in PATCHED]
    headguard.guard_heads(Observer(), print)
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(PATCHED, before, strict=True))
    headguard.stop_guarding()
    assert [vars(owner)[name] for owner, name in PATCHED] == before
    assert "close_connection" not in vars(_http2.Http2Server)


def test_a_record_with_the_largest_heads_fits() -> None:
    parts = Parts(cap=MAX_INLINE)
    many = [(b"x-%d" % number, b"v" * 255) for number in range(MAX_FIELDS)]
    body = b"b" * (MAX_INLINE // 2)
    flow = tflow.tflow(
        req=tutils.treq(headers=many, content=body, path=b"/" + b"p" * 1000),
        resp=tutils.tresp(headers=many, content=body),
    )
    parts.recorder.open(flow)
    parts.recorder.response(flow)
    assert max(parts.journal.sizes) < 900_000 and sum(parts.journal.sizes) > 2 * len(body)
