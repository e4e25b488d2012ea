"""Binary composites and arrays, byte for byte."""

import struct

import pytest

from megido_ingest import packing, rows
from megido_ingest.failpoints import POINTS, reach
from megido_ingest.flows import Chunks, day_number, pack_flow
from megido_shared import events, ids
from megido_shared.db import codecs
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.ingest.traffic import an_event

PAIR = packing.RowType("pair", [("n", "integer"), ("t", "text")])


def test_a_row_is_its_fields_with_type_and_length() -> None:
    assert PAIR.pack(7, "ab") == struct.pack(">iIii", 2, 23, 4, 7) + struct.pack(">Ii", 25, 2) + b"ab"
    assert PAIR.pack(None, "") == struct.pack(">iIi", 2, 23, -1) + struct.pack(">Ii", 25, 0)


def test_long_values_have_their_length_too() -> None:
    assert PAIR.pack(1, "x" * 5000)[-5004:-5000] == struct.pack(">i", 5000)


def test_a_number_that_does_not_fit_is_refused() -> None:
    with pytest.raises(struct.error):
        PAIR.pack(1 << 40, "")


def test_arrays() -> None:
    assert packing.array(99, []) == struct.pack(">iiI", 0, 0, 99)
    assert packing.array(99, [b"ab", b"c"]) == (
        struct.pack(">iiIii", 1, 0, 99, 2, 1) + struct.pack(">i", 2) + b"ab" + struct.pack(">i", 1) + b"c"
    )


def _fields(row: bytes) -> dict[str, bytes | None]:
    """Takes a packed flow apart again."""
    (count,) = struct.unpack_from(">i", row)
    assert count == len(rows.FLOW.fields)
    at, found = 4, {}
    for name, kind in rows.FLOW.fields:
        oid, length = struct.unpack_from(">Ii", row, at)
        assert oid == packing.OIDS[kind], name
        at += 8
        found[name] = None if length < 0 else row[at : at + length]
        at += max(0, length)
    assert at == len(row)
    return found


@pytest.mark.parametrize(
    "flow",
    [
        a_completed_flow(),
        a_completed_flow(response=None),
        a_completed_flow(request=a_request(method=b"\xff", host="\0"), is_replay=True, original_flow_id=ids.new_id()),
        a_completed_flow(response=a_response(trailers=events.pack_headers([(b"a", b"b")])), error_message="said"),
        an_event(events.FlowStarted, flow_id=ids.new_id(), request=a_request()),
        an_event(
            events.FlowFailed, flow_id=ids.new_id(), request=a_request(),
            failure=events.Failure(events.ErrorType.TIMEOUT, "slow\0", "trace"),
        ),
    ],
)  # fmt: skip
def test_every_flow_has_every_field(flow: events.AnyFlow) -> None:
    fields = _fields(pack_flow(flow, Chunks(), lambda day, data: bytes(32)))
    assert fields["flow_id"] == flow.flow_id
    stored = fields["request_headers"]
    assert stored is not None and codecs.unpack(stored) == bytes(flow.request.headers)
    assert (fields["status"] is None) == (flow.response is None)
    if isinstance(flow, events.FlowFailed):
        assert (fields["error_type"], fields["error_message"]) == (b"TIMEOUT", b"slow")


def test_bodies_belong_to_the_day_of_the_flow() -> None:
    days = []
    flow = a_completed_flow()
    pack_flow(flow, Chunks(), lambda day, data: days.append(day) or bytes(32))
    assert days == [(ids.day_of(flow.flow_id).date() - ids.day_of(bytes(16)).date()).days - packing.EPOCH_2000_DAYS]
    assert days == [day_number(flow.flow_id)]


def test_failpoints_do_nothing_unless_asked() -> None:
    for point in POINTS:
        reach(point)
