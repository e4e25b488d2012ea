"""Events that decode and that no row, or no reader of one, can hold: a dead letter each, the neighbours stored."""

import pytest

from megido_ingest.bodycache import BodyCache
from megido_ingest.prepare import prepare
from megido_shared import events, ids
from megido_shared.bus.base import Batch
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.ingest.support import Log

_YEAR_9999_US = 253_370_764_800_000_000
_BEYOND = (253_402_300_800_000).to_bytes(6) + b"\x70\x00\x80" + bytes(7)
"""A UUIDv7 of the first millisecond of the year 10000."""
_LAST = (253_402_300_799_999).to_bytes(6) + b"\x70\x00\x80" + bytes(7)


def _chunk(flow_id: bytes) -> events.BodyChunk:
    return events.BodyChunk(
        event_id=ids.new_id(), node="n", epoch=ids.new_id(), time_us=1, flow_id=flow_id, side="request", index=0,
        data=b"x",
    )  # fmt: skip


def _took(us: int, **changes: int) -> events.FlowCompleted:
    return a_completed_flow(timing=events.Timing(response_us=us), **changes)


def _failed(us: int) -> events.FlowFailed:
    flow = a_completed_flow()
    return events.FlowFailed(
        event_id=ids.new_id(), node="n", epoch=ids.new_id(), time_us=_YEAR_9999_US, flow_id=flow.flow_id,
        request=flow.request, timing=events.Timing(response_us=us),
        failure=events.Failure(events.ErrorType.OTHER, "broken"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(a_completed_flow(flow_id=_BEYOND), id="flow id beyond every partition"),
        pytest.param(_chunk(_BEYOND), id="chunk beyond every partition"),
        pytest.param(_took(1 << 62), id="a duration that overflows the sum of durations"),
        pytest.param(_took(366 * 86_400_000_000, time_us=_YEAR_9999_US), id="ends beyond the year 9999"),
        pytest.param(_failed(366 * 86_400_000_000), id="fails beyond the year 9999"),
        pytest.param(a_completed_flow(request=a_request(body=events.Body(chunks=-1))), id="-1 chunks"),
        pytest.param(a_completed_flow(request=a_request(body=events.Body(size=-1))), id="-1 bytes"),
    ],
)
def test_what_cannot_be_stored_becomes_a_dead_letter(bad: events.AnyEvent) -> None:
    log = Log()
    log.add(a_completed_flow(seq=1), bad, a_completed_flow(seq=2))
    prepared = prepare(Batch(log.records), {}, BodyCache())
    assert len(prepared.letters) == 1, prepared.reasons
    assert len(prepared.flows) == 2


@pytest.mark.parametrize("good", [a_completed_flow(flow_id=_LAST), _took(365 * 86_400_000_000), _took(-1)])
def test_what_is_only_unusual_is_stored(good: events.FlowCompleted) -> None:
    log = Log()
    log.add(good)
    prepared = prepare(Batch(log.records), {}, BodyCache())
    assert not prepared.letters, prepared.reasons
    assert len(prepared.flows) == 1
