"""The statistics' answer, put together from sums. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from megido_api.stats.queries import IndexLag, Sums
from megido_api.views import iso
from megido_shared.db.rollups import DAY, HOUR, MINUTE, Segment, percentiles

_BUCKETS = {MINUTE: "minute", HOUR: "hour", DAY: "day"}
_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Found:
    """`counted`: the counters of all that was ever stored, None when a range was asked for."""

    span: tuple[datetime, datetime] | None
    counted: Sums | None
    ranged: Sums
    hosts: Sequence[tuple[str, int]]
    failures: int
    lag: IndexLag
    part: Segment | None
    series: Mapping[datetime, Mapping[str, int]]
    latencies: Mapping[datetime, Mapping[int, int]]


def answer(found: Found, bucket: str | None, now: datetime) -> dict[str, Any]:
    """The shape of `schemas.Stats`. `bucket`: what was asked for; `now` bounds the time that rates are over."""
    ranged = found.ranged
    seconds = _seconds(found.span, now)
    requests, errors = _sum(ranged, "requests"), _sum(ranged, "error")
    return _totals(found) | {
        "recent_auth_failures": found.failures,
        "since": iso(found.span[0]) if found.span else None,
        "until": iso(found.span[1]) if found.span else None,
        "requests_per_second": round(requests / seconds, 3) if seconds else 0.0,
        "errors_per_second": round(errors / seconds, 3) if seconds else 0.0,
        "requests_by_status": [
            {"status_code": int(label), "count": count} for label, count in _most_first(ranged, "status")
        ],
        "errors_by_type": _by_label(ranged, "error", "error_type"),
        "top_hosts": [{"host": host, "count": count} for host, count in found.hosts],
        "request_bytes": _sum(ranged, "request_bytes"),
        "response_bytes": _sum(ranged, "response_bytes"),
        "latency": _latency({int(label): count for label, count in ranged.get("latency", {}).items()}),
        "bucket": bucket if found.part is None else _BUCKETS[found.part.minutes],
        "series": _series(found),
        "text_index": {"lag_batches": found.lag.batches, "lag_seconds": round(found.lag.seconds, 3)},
    }


def _totals(found: Found) -> dict[str, Any]:
    """Of everything from the counters, which know what no rollup tells; of a range from the rollups."""
    sums = found.ranged if found.counted is None else found.counted
    names = ("messages", "error", "method", "protocol")
    if found.counted is not None:
        names = ("websocket_messages", "errors", "requests_by_method", "requests_by_protocol")
    messages, errors, methods, protocols = names
    timed = _sum(sums, "responses_timed")
    return {
        "total_requests": _sum(sums, "requests"),
        "total_websocket_messages": _sum(sums, messages),
        "total_errors": _sum(sums, errors),
        "requests_by_method": _by_label(sums, methods, "method"),
        "requests_by_protocol": _by_label(sums, protocols, "protocol"),
        "avg_response_time": round(_sum(sums, "response_time_us") / timed / 1000, 3) if timed else 0.0,
    }


def _series(found: Found) -> list[dict[str, Any]]:
    if found.part is None:
        return []
    width = timedelta(minutes=found.part.minutes)
    count = (found.part.end - found.part.begin) // width
    return [_point(found, found.part.begin + number * width) for number in range(count)]


def _point(found: Found, moment: datetime) -> dict[str, Any]:
    values = found.series.get(moment, {})
    timed = values.get("responses_timed", 0)
    return {
        "time": iso(moment),
        "requests": values.get("requests", 0),
        "errors": values.get("error", 0),
        "avg_response_time": round(values["response_time_us"] / timed / 1000, 3) if timed else None,
        "latency": _latency(found.latencies.get(moment, {})),
    }


def _latency(histogram: Mapping[int, int]) -> dict[str, float] | None:
    found = percentiles(histogram, tuple(_SHARES.values()))
    return None if found is None else {name: round(us / 1000, 3) for name, us in zip(_SHARES, found, strict=True)}


def _seconds(span: tuple[datetime, datetime] | None, now: datetime) -> float:
    if span is None:
        return 0.0
    end = span[1] if span[0] >= now else min(span[1], now)
    return (end - span[0]).total_seconds()


def _sum(sums: Sums, name: str) -> int:
    return sum(sums.get(name, {}).values())


def _most_first(sums: Sums, name: str) -> list[tuple[str, int]]:
    """A label whose flows all changed to another one (0) is left out."""
    found = sorted(sums.get(name, {}).items(), key=lambda item: (-item[1], item[0]))
    return [(label, count) for label, count in found if count]


def _by_label(sums: Sums, name: str, label: str) -> list[dict[str, Any]]:
    return [{label: value, "count": count} for value, count in _most_first(sums, name)]
