"""Statistics of everything and of a range equal a count of the rows; a range that is asked for in vain is empty."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from megido_ingest.rollups import prune
from megido_shared import events, ids
from megido_shared.clock import to_us
from megido_shared.db.connect import connect, conninfo
from megido_shared.testing import a_completed_flow, a_request, a_response
from tests.integration.api.harness import Api, Ingest, eventually
from tests.integration.ingest.traffic import an_event

PATH = "/proxy/api/stats/"
MINUTE = timedelta(minutes=1)


async def _filled(api: Api) -> tuple[datetime, list[dict[str, Any]]]:
    """Four flows a minute for ten minutes of an hour ago, one of them failed; and what each is."""
    start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(hours=1)
    made: list[events.AnyEvent] = []
    told: list[dict[str, Any]] = []
    for n in range(40):
        at = start + n // 4 * MINUTE + timedelta(seconds=n % 4)
        host, method = f"h{n % 3}.example", ("GET", "POST")[n % 2]
        common: dict[str, Any] = {
            "time_us": to_us(at), "seq": n + 1, "request": a_request(host=host, method=method.encode())
        }  # fmt: skip
        failed = n % 4 == 3
        if failed:
            failure = events.Failure(events.ErrorType.TIMEOUT, "late")
            made.append(an_event(events.FlowFailed, flow_id=ids.new_id(), **common, failure=failure))
        else:
            timing = events.Timing(response_us=1000 * (n + 1))
            made.append(a_completed_flow(**common, timing=timing, response=a_response(status=200 + n % 3)))
        status = None if failed else 200 + n % 3
        told.append({"at": at, "host": host, "method": method, "status": status, "ms": None if failed else n + 1})
    await api.publish(*made)

    async def all_there() -> bool:
        return bool((await api.get(PATH))["total_requests"] == 40)

    await eventually(all_there, "40 flows are counted")
    return start, told


def _check(found: dict[str, Any], told: list[dict[str, Any]]) -> None:
    def counts(name: str) -> Counter[Any]:
        return Counter(one[name] for one in told if one[name] is not None)

    times = [one["ms"] for one in told if one["ms"] is not None]
    assert found["total_requests"] == len(told)
    assert found["total_errors"] == len(told) - len(times)
    assert {e["method"]: e["count"] for e in found["requests_by_method"]} == counts("method")
    assert {e["status_code"]: e["count"] for e in found["requests_by_status"]} == counts("status")
    assert {e["host"]: e["count"] for e in found["top_hosts"]} == counts("host")
    assert found["errors_by_type"] == ([{"error_type": "TIMEOUT", "count": len(told) - len(times)}] if told else [])
    assert found["avg_response_time"] == (round(sum(times) / len(times), 3) if times else 0)
    if times:
        exact = sorted(times)[len(times) // 2]
        assert exact / 1.25 <= found["latency"]["p50"] <= exact * 1.25
    else:
        assert found["latency"] is None


async def test_everything_and_ranges(api: Api, ingest: Ingest) -> None:
    start, told = await _filled(api)
    _check(await api.get(PATH), told)
    for first, last in ((0, 10), (2, 5), (0, 1), (9, 10), (20, 30)):
        begin, end = start + first * MINUTE, start + last * MINUTE
        found = await api.get(PATH, **{"from": begin.isoformat(), "to": end.isoformat()})
        assert (found["since"], found["until"]) == (begin.isoformat(), end.isoformat())
        within = [one for one in told if begin <= one["at"] < end]
        _check(found, within)
        assert found["requests_per_second"] == round(len(within) / (end - begin).total_seconds(), 3)
    _check(
        await api.get(PATH, **{"from": (start + 3 * MINUTE).isoformat()}),
        [o for o in told if o["at"] >= start + 3 * MINUTE],
    )
    _check(await api.get(PATH, to=(start + 3 * MINUTE).isoformat()), [o for o in told if o["at"] < start + 3 * MINUTE])


async def test_a_series_has_every_bucket(api: Api, ingest: Ingest) -> None:
    start, told = await _filled(api)
    end = start + 12 * MINUTE
    found = await api.get(PATH, **{"from": start.isoformat(), "to": end.isoformat(), "bucket": "minute"})
    assert [point["time"] for point in found["series"]] == [(start + n * MINUTE).isoformat() for n in range(12)]
    assert [(p["requests"], p["errors"]) for p in found["series"]] == [(4, 1)] * 10 + [(0, 0)] * 2
    assert found["series"][0]["avg_response_time"] == 2.0
    assert found["series"][11]["latency"] is None
    by_day = await api.get(PATH, bucket="day")
    assert sum(point["requests"] for point in by_day["series"]) == 40
    by_hour = await api.get(PATH, bucket="hour")
    assert sum(point["requests"] for point in by_hour["series"]) == len(told)


async def _counted(api: Api, name: str, count: int) -> None:
    async def counted() -> bool:
        return bool((await api.get(PATH))[name] == count)

    await eventually(counted, f"{name} is {count}")


async def test_what_cannot_be_answered_is_refused(api: Api, ingest: Ingest) -> None:
    await _filled(api)
    await api.publish(a_completed_flow(seq=99, time_us=to_us(datetime.now(UTC) - timedelta(days=30))))
    await _counted(api, "total_requests", 41)
    wide = (datetime.now(UTC) - timedelta(days=2)).isoformat()
    for params in (
        {"bucket": "minute", "from": wide}, {"bucket": "week"}, {"from": "yesterday"}, {"since": "1"},
    ):  # fmt: skip
        found = await api.get(PATH, status=400, **params)
        assert found["error"]["details"]["fields"][0]["field"] == next(iter(params))


async def test_what_comes_without_requests_is_counted(api: Api, ingest: Ingest) -> None:
    """An upstream that is down for days, or guesses at a proxy that nobody uses."""
    now = datetime.now(UTC)
    for n, days in enumerate((9, 6, 0)):
        at = to_us(now - timedelta(days=days))
        failure = events.Failure(events.ErrorType.TIMEOUT, "late")
        error = an_event(events.ErrorRaised, error_id=ids.new_id(), seq=n + 1, time_us=at, failure=failure)
        await api.publish(error)
    await _counted(api, "total_errors", 3)
    await api.publish(a_completed_flow(flow_id=ids.new_id(), seq=9, time_us=to_us(now - timedelta(days=7))))
    await _counted(api, "total_requests", 1)
    for begin, end, errors in ((10, None, 3), (10, 8, 1), (6.5, None, 2), (1, None, 1), (5, 1, 0)):
        bounds = {"from": (now - timedelta(days=begin)).isoformat()}
        if end is not None:
            bounds["to"] = (now - timedelta(days=end)).isoformat()
        found = await api.get(PATH, **bounds, bucket="day")
        assert found["total_errors"] == errors, bounds
        assert found["errors_by_type"] == ([{"error_type": "TIMEOUT", "count": errors}] if errors else [])
        assert sum(point["errors"] for point in found["series"]) >= errors


async def test_a_series_is_of_what_is_still_kept(api: Api, ingest: Ingest) -> None:
    """Minutes of ten days ago are gone: hours tell of them, and the answer says so; likewise hours of two years ago."""
    now = datetime.now(UTC)
    for n, days in enumerate((700, 10)):
        at = to_us(now - timedelta(days=days))
        await api.publish(a_completed_flow(flow_id=ids.new_id(), seq=n + 1, time_us=at))
    await _counted(api, "total_requests", 2)
    async with await connect(api.state.settings.common.database_url) as connection:
        await prune(connection)
    for days, bucket, expected in ((10, "minute", "hour"), (10, "hour", "hour"), (700, "minute", "day")):
        begin, end = now - timedelta(days=days, hours=1), now - timedelta(days=days, hours=-1)
        params = {"from": begin.isoformat(), "to": end.isoformat(), "bucket": bucket}
        found = await api.get(PATH, **params)
        assert (found["bucket"], found["total_requests"]) == (expected, 1)
        assert sum(point["requests"] for point in found["series"]) == 1


@pytest.mark.parametrize("days", [20_000, -20_000])
async def test_one_posted_time_does_not_stretch_the_statistics(api: Api, ingest: Ingest, days: int) -> None:
    start, told = await _filled(api)
    odd = datetime.now(UTC) - timedelta(days=days)
    await api.publish(a_completed_flow(flow_id=ids.new_id(), seq=99, time_us=to_us(odd)))
    await _counted(api, "total_requests", 41)
    found = await api.get(PATH)
    since, until = (datetime.fromisoformat(found[name]) for name in ("since", "until"))
    assert since <= start < until
    assert until - since <= timedelta(days=30)
    for bucket in ("minute", "hour", "day"):
        found = await api.get(PATH, bucket=bucket)
        assert found["bucket"] == bucket
        assert len(found["series"]) <= 1500
        assert sum(point["requests"] for point in found["series"]) == len(told)
    # Asked for, it is there.
    asked = {"from": (odd - timedelta(days=1)).isoformat(), "to": (odd + timedelta(days=1)).isoformat()}
    assert (await api.get(PATH, **asked))["total_requests"] == 1


async def test_a_long_history_by_the_minute_is_its_newest(api: Api, ingest: Ingest) -> None:
    await _filled(api)
    old = datetime.now(UTC) - timedelta(days=20)
    flow_id = ids.floor_id(old).bytes[:6] + ids.new_id()[6:]
    await api.publish(a_completed_flow(flow_id=flow_id, seq=99, time_us=to_us(old)))
    await _counted(api, "total_requests", 41)
    found = await api.get(PATH, bucket="minute")
    assert (found["bucket"], len(found["series"])) == ("minute", 1500)
    assert sum(point["requests"] for point in found["series"]) == 40
    assert datetime.fromisoformat(found["since"]) <= old


async def test_nothing_is_scanned_and_an_empty_history_has_statistics(api: Api, ingest: Ingest) -> None:
    empty = await api.get(PATH, bucket="minute")
    assert (empty["total_requests"], empty["since"], empty["series"], empty["latency"]) == (0, None, [], None)
    start, told = await _filled(api)
    with psycopg.connect(conninfo(api.state.settings.common.database_url), autocommit=True) as admin:
        admin.execute("DROP TABLE flows, websocket_messages, errors CASCADE")
    _check(await api.get(PATH, **{"from": start.isoformat(), "bucket": "hour"}), told)


async def test_how_far_searches_in_bodies_are_behind(api: Api, ingest: Ingest) -> None:
    await _filled(api)
    lag = (await api.get(PATH))["text_index"]
    assert lag["lag_batches"] >= 1
    assert lag["lag_seconds"] >= 0
    with psycopg.connect(conninfo(api.state.settings.common.database_url), autocommit=True) as admin:
        admin.execute("INSERT INTO feed_cursors SELECT 'text-index', max(seq) FROM feed")
    assert (await api.get(PATH))["text_index"] == {"lag_batches": 0, "lag_seconds": 0}
