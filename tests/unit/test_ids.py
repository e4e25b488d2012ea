import time
import uuid
from datetime import UTC, datetime, timedelta

import uuid_utils
from pytest import MonkeyPatch

from megido_shared import ids


def test_ids_are_uuid7_and_only_rise() -> None:
    made = [ids.new_id() for _ in range(20_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    assert {uuid.UUID(bytes=raw).version for raw in made} == {7}


def test_ids_rise_when_the_wall_clock_jumps_back(monkeypatch: MonkeyPatch) -> None:
    before = ids.new_id()
    an_hour_ago = uuid_utils.uuid7(nanoseconds=time.time_ns() - 3600 * 10**9)
    monkeypatch.setattr(ids.uuid_utils, "uuid7", lambda: an_hour_ago)
    later = [ids.new_id() for _ in range(3)]
    assert [before, *later] == sorted({before, *later})


def test_time_day_and_bounds() -> None:
    moment = datetime(2026, 2, 13, 23, 59, 59, 999000, tzinfo=UTC)
    floor = ids.floor_id(moment).bytes
    assert ids.day_of(floor) == datetime(2026, 2, 13, tzinfo=UTC)
    assert ids.time_ms(floor) == moment.timestamp() * 1000
    assert ids.day_of(ids.floor_id(moment + timedelta(milliseconds=1)).bytes) == datetime(2026, 2, 14, tzinfo=UTC)
    now = datetime.now(UTC)
    assert ids.floor_id(now).bytes <= ids.new_id()


def test_text_round_trip() -> None:
    made = ids.new_id()
    assert ids.parse(ids.to_text(made)) == made == ids.parse(made.hex())
    assert ids.connection_id(made) == "ws_" + made.hex()
