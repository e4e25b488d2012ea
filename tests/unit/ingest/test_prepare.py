"""Where the streams of a batch go on after it, and what a batch says of itself."""

from megido_ingest.bodycache import BodyCache
from megido_ingest.flows import Remembered
from megido_ingest.prepare import Prepared, prepare
from megido_shared import events, ids
from megido_shared.bus.base import Batch, Record, Stream
from megido_shared.testing import a_completed_flow

A, B = Stream("a", "megido.flows", 0), Stream("b", "megido.flows", 0)


def _prepared(*records: Record) -> Prepared:
    return prepare(Batch(records), {}, BodyCache())


def test_streams_that_take_turns_each_end_behind_their_last_record() -> None:
    flows = [a_completed_flow() for _ in range(4)]
    values = [events.encode(flow) for flow in flows]
    again = Stream("a", "megido.flows", 0)  # another object, the same stream
    made = _prepared(
        Record(A, 0, 10, b"", values[0]),
        Record(B, 5, 6, b"", values[1]),
        Record(again, 10, 20, b"", values[2]),
        Record(B, 6, 7, b"", values[3]),
    )
    assert {stream: (end.next_offset, end.last_event_id) for stream, end in made.ends.items()} == {
        A: (20, flows[2].event_id),
        B: (7, flows[3].event_id),
    }
    assert len(made.flows) == 4


def test_a_stream_that_ends_with_a_bad_record_has_no_last_event() -> None:
    made = _prepared(Record(A, 0, 1, b"", events.encode(a_completed_flow())), Record(A, 1, 2, b"", b"junk"))
    assert (made.ends[A].next_offset, made.ends[A].last_event_id, len(made.letters)) == (2, b"", 1)


def test_the_newest_event_counts_in_whatever_order_they_came() -> None:
    older, newer = ids.new_id(), ids.new_id()
    newer = (ids.time_ms(newer) + 5).to_bytes(6) + newer[6:]
    values = [events.encode(a_completed_flow(event_id=event_id)) for event_id in (older, newer, older)]
    made = _prepared(*(Record(A, n, n + 1, b"", value) for n, value in enumerate(values)))
    assert made.newest_ms == ids.time_ms(newer)
    assert _prepared().newest_ms == 0


def test_what_is_remembered_is_made_once_and_stays_bounded() -> None:
    made: list[int] = []
    remembered = Remembered[int, str](lambda key: made.append(key) or str(key), limit=3)
    assert [remembered[n] for n in (1, 1, 2, 3, 4, 4, 1)] == ["1", "1", "2", "3", "4", "4", "1"]
    assert made == [1, 2, 3, 4, 1]
    assert len(remembered) == 2
