"""Flows for bench-query: made like traffic, stored by ingest's own transaction, spread over some days.

Hosts and applications are few and uneven, most requests have no body, a quarter of the responses are images, and words
are planted in URLs and bodies so that it is known how many there are of each.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context

from msgspec.structs import replace

from benchmarks.ingest import a_flow
from benchmarks.report import say
from megido_ingest.prepare import prepare
from megido_ingest.store import Store
from megido_shared import events
from megido_shared.bus.base import Batch, Record, Stream

DAYS = 8
BATCH = 2_000
WORDS = {"common": 0.05, "rare": 0.001}
"""Share of the URLs, and of the text bodies, that a planted word is in; `once` is in one of each, `never` in none."""
URL = {"common": "checkout", "rare": "auditlog", "once": "needle-in-url", "never": "no-such-path"}
BODY = {"common": "warehouse", "rare": "escalation", "once": "needle-in-body", "never": "no-such-text"}
_AGENTS = [f"Mozilla/5.0 (X11; Linux x86_64) Chrome/{n}.0 Safari/537.36".encode() for n in range(120, 132)] + [
    b"curl/8.11.0", b"python-requests/2.32.3", b"okhttp/4.12.0",
]  # fmt: skip
_MS_A_DAY = 86_400_000


@dataclass(frozen=True, slots=True)
class Filled:
    seconds: float
    record_bytes: int
    """Of the events as they came over the bus."""


def flow(rng: random.Random, n: int, total: int, begin_ms: int) -> events.AnyFlow:
    """The n-th of `total` flows."""
    made = a_flow(rng, n + 1)
    assert made.response is not None
    ms = begin_ms + n * DAYS * _MS_A_DAY // total
    flow_id = uuid7(ms, n, rng)
    request = _request(rng, made.request, once=n == total // 3)
    common = {
        "event_id": flow_id, "flow_id": flow_id, "time_us": ms * 1000, "request": request,
        "source_app": rng.choices(("", "shop", "crm", "scanner"), (80, 15, 4.9, 0.1))[0],
    }  # fmt: skip
    if rng.random() < 0.004:
        failure = events.Failure(events.ErrorType.TIMEOUT, "no answer within 30 s")
        return events.FlowFailed(
            **common, node=made.node, epoch=made.epoch, seq=made.seq, client=made.client, failure=failure
        )
    return replace(
        made,
        **common,
        response=_response(rng, made.response, once=n == total // 2),
        timing=events.Timing(response_us=int(rng.lognormvariate(10.5, 0.9))),
    )


def _request(rng: random.Random, made: events.Request, *, once: bool) -> events.Request:
    headers = [pair for pair in events.unpack_headers(made.headers) if pair[0] != b"User-Agent"]
    return replace(
        made,
        host=f"{rng.choice(('api', 'www', 'img', 'auth'))}{int(rng.paretovariate(1.2)) % 200}.example.com",
        target=_planted(rng, URL, once, made.target, b"/%b"),
        headers=events.pack_headers([*headers, (b"User-Agent", rng.choice(_AGENTS))]),
        body=events.Body() if made.method == b"GET" else made.body,
    )


def _response(rng: random.Random, made: events.Response, *, once: bool) -> events.Response:
    status = rng.choices((200, 201, 204, 301, 304, 401, 404, 500, 503), (70, 6, 3, 3, 6, 3, 6, 2, 0.3))[0]
    if once:
        status = 200
    if status in {204, 304}:
        return replace(made, status=status, body=events.Body())
    if rng.random() < 0.25 and not once:
        image = b"\x89PNG\r\n\x1a\n" + rng.randbytes(1500)
        headers = events.pack_headers([(b"Content-Type", b"image/png"), (b"Server", b"nginx")])
        return replace(made, status=status, headers=headers, body=events.Body(data=image, size=len(image)))
    data = _planted(rng, BODY, once, made.body.data, b'{"note": "%b"}')
    return replace(made, status=status, body=events.Body(data=data, size=len(data)))


def _planted(rng: random.Random, words: dict[str, str], once: bool, data: bytes, form: bytes) -> bytes:
    for name, share in WORDS.items():
        if rng.random() < share:
            data += form % words[name].encode()
    return data + form % words["once"].encode() if once else data


def uuid7(ms: int, n: int, rng: random.Random) -> bytes:
    """In the order of `n`, as one node mints them."""
    tail = bytearray(rng.randbytes(10))
    tail[0] = 0x70 | (n >> 8 & 0x0F)
    tail[1] = n & 0xFF
    tail[2] = 0x80 | (tail[2] & 0x3F)
    return ms.to_bytes(6) + bytes(tail)


def fill(url: str, total: int, processes: int = 2) -> Filled:
    """Stores `total` flows that end today."""
    begin = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=DAYS - 1)
    begin_ms = int(begin.timestamp() * 1000)
    begun = time.perf_counter()
    share = -(-total // BATCH // processes) * BATCH
    parts = [(url, k, range(k * share, min((k + 1) * share, total)), total, begin_ms) for k in range(processes)]
    with get_context("spawn").Pool(processes) as pool:
        sizes = pool.starmap(_part, parts)
    return Filled(time.perf_counter() - begun, sum(sizes))


def _part(url: str, number: int, numbers: range, total: int, begin_ms: int) -> int:
    return asyncio.run(_store(url, number, numbers, total, begin_ms))


async def _store(url: str, number: int, numbers: Sequence[int], total: int, begin_ms: int) -> int:
    rng = random.Random(number)
    store = Store(url)
    stream = Stream(f"bench-{number}", "megido.flows", 0)
    await store.claim([stream])
    size = offset = 0
    for begin in range(0, len(numbers), BATCH):
        values = [events.encode(flow(rng, n, total, begin_ms)) for n in numbers[begin : begin + BATCH]]
        size += sum(map(len, values))
        records = [Record(stream, offset + k, offset + k + 1, b"", value) for k, value in enumerate(values)]
        offset += len(records)
        await store.store(prepare(Batch(records), dict(store.generations), store.cache))
        if begin % 50_000 == 0:
            say(f"part {number}: {begin + len(values):,} of {len(numbers):,} flows")
    await store.close()
    return size
