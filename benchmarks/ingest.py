"""How fast ingest stores, against the fastest way there is into the same tables, and how soon a flow can be found.

`copy_ratio`: rows/s of the real worker (decode, compress, pack, one exactly-once transaction a batch, every index,
counters, feed) ÷ rows/s of binary COPY of the very same rows, prepacked, and their already compressed bodies, with
the same number of rows a commit. Both on one server, in turns, one connection each.
`queryable_*`: seconds from an append to a capture journal until a query finds the flow, through a running
`megido ingest` process over the local bus.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles

import psycopg

from benchmarks.report import finish, ratio, say
from megido_ingest import worker
from megido_ingest.__main__ import tune_interpreter
from megido_ingest.health import Health
from megido_ingest.metrics import Metrics
from megido_ingest.store import Store
from megido_shared import events, ids
from megido_shared.bus.base import Batch, Position, Record, Resume, Revoked, Stream
from megido_shared.bus.local import Journal
from megido_shared.bus.topics import Topic
from megido_shared.datadir import DataDir
from megido_shared.db.connect import conninfo
from megido_shared.db.embedded import EmbeddedPostgres
from megido_shared.db.migrate import migrate
from megido_shared.testing import a_completed_flow, a_request, a_response

EPOCH = bytes(range(16))
BATCH = worker.MAX_RECORDS
TABLES = ("bodies", "flows")
_WORDS = [f"{w}{n}" for n in range(40) for w in ("alpha", "user", "token", "item", "order", "price", "state", "name")]


def a_flow(rng: random.Random, seq: int) -> events.FlowCompleted:
    """About 3 KB: 1 KB of headers, 0.3 KB of request, 2 KB of response; half of it compresses away."""
    trace = rng.randbytes(16).hex()
    common = [(b"X-Request-Id", trace.encode()), (b"Cookie", b"session=" + rng.randbytes(60).hex().encode())]
    agent = b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0 Safari/537.36"
    request = a_request(
        method=rng.choice((b"GET", b"GET", b"GET", b"POST", b"PUT")),
        host=f"api{rng.randrange(50)}.example.com",
        target=f"/v1/{rng.choice(_WORDS)}/{rng.randrange(10**6)}?page={rng.randrange(100)}&q={trace[:8]}".encode(),
        headers=events.pack_headers(
            [(b"Host", b"api.example.com"), (b"User-Agent", agent), (b"Accept", b"application/json, */*;q=0.8"),
             (b"Accept-Language", b"en-GB,en;q=0.9"), (b"Accept-Encoding", b"gzip, deflate, br"), *common]
        ),
        body=_body(rng, 300),
    )  # fmt: skip
    response = a_response(
        status=rng.choice((200, 200, 200, 201, 304, 404, 500)),
        headers=events.pack_headers(
            [(b"Content-Type", b"application/json; charset=utf-8"), (b"Cache-Control", b"no-store, max-age=0"),
             (b"Strict-Transport-Security", b"max-age=31536000; includeSubDomains"), (b"Server", b"nginx"),
             (b"Date", b"Tue, 24 Nov 2026 12:00:00 GMT"), (b"ETag", rng.randbytes(16).hex().encode()), *common]
        ),
        body=_body(rng, 2000),
    )  # fmt: skip
    return a_completed_flow(
        node="capture-0", epoch=EPOCH, seq=seq, request=request, response=response,
        client=events.Peer(ip=f"10.0.0.{rng.randrange(20)}", port=50_000),
    )  # fmt: skip


def _body(rng: random.Random, size: int) -> events.Body:
    parts: list[str] = []
    length = 0
    while length < size:
        part = f'{{"{rng.choice(_WORDS)}": "{rng.randbytes(8).hex()}", "n": {rng.randrange(10**6)}}},'
        parts.append(part)
        length += len(part)
    data = "".join(parts)[:size].encode()
    return events.Body(data=data, size=size)


class MemoryConsumer:
    """A stream that is all there: what the bus costs is not part of the figure."""

    def __init__(self, values: Sequence[bytes], stream: Stream, resume: Resume) -> None:
        self._values = values
        self._stream = stream
        self._resume = resume
        self._next = -1
        self.done = asyncio.Event()

    async def poll(self, *, max_records: int = 2000, max_bytes: int = 8 << 20, timeout: float = 1.0) -> Batch:
        if self._next < 0:
            found: Mapping[Stream, Position] = await self._resume([self._stream])
            self._next = found[self._stream].offset
        end = min(self._next + max_records, len(self._values))
        if self._next == end:
            await asyncio.sleep(0.001)
            return Batch()
        records = [Record(self._stream, n, n + 1, b"", self._values[n]) for n in range(self._next, end)]
        self._next = end
        return Batch(records)

    async def commit(self, positions: Mapping[Stream, int]) -> None:
        if positions[self._stream] == len(self._values):
            self.done.set()

    def assigned(self) -> frozenset[Stream]:
        return frozenset({self._stream})

    async def lag(self) -> Mapping[Stream, int]:
        return {self._stream: 0}

    async def close(self) -> None:
        pass


class MemoryBus:
    """Only what the worker asks of a bus."""

    def __init__(self, values: Sequence[bytes], source_id: str) -> None:
        self._values = values
        self._stream = Stream(source_id, "megido.flows", 0)
        self.consumers: list[MemoryConsumer] = []

    async def create_topics(self, topics: Sequence[Topic]) -> list[str]:
        return []

    async def consumer(
        self,
        group: str,
        topics: Sequence[Topic],
        *,
        resume: Resume | None = None,
        revoked: Revoked | None = None,
        pins: bool = False,
    ) -> MemoryConsumer:
        assert resume is not None
        self.consumers.append(MemoryConsumer(self._values, self._stream, resume))
        return self.consumers[-1]


async def ingest_all(url: str, values: Sequence[bytes], source_id: str) -> float:
    """Stores encoded events as the worker does; answers the seconds that it took."""
    bus = MemoryBus(values, source_id)
    store = Store(url)
    await store.ping()
    stop = asyncio.Event()
    running = asyncio.create_task(
        worker.Worker(bus, store, Metrics("records"), Health()).run(stop)  # type: ignore[arg-type]
    )
    begun = time.perf_counter()
    while not bus.consumers and not running.done():
        await asyncio.sleep(0)
    if bus.consumers:
        await asyncio.wait({running, asyncio.create_task(bus.consumers[0].done.wait())}, return_when="FIRST_COMPLETED")
    if running.done():
        await running  # raises what ended it
    seconds = time.perf_counter() - begun
    stop.set()
    await running
    await store.close()
    return seconds


def _copy(connection: psycopg.Connection, batches: Iterable[Mapping[str, bytes]]) -> float:
    begun = time.perf_counter()
    for batch in batches:
        with connection.transaction():
            for table in TABLES:
                with connection.cursor().copy(f"COPY {table} FROM STDIN (FORMAT binary)") as copy:
                    copy.write(batch[table])
    return time.perf_counter() - begun


def _prepacked(connection: psycopg.Connection) -> list[dict[str, bytes]]:
    """What is stored now, as binary COPY data, a batch of ingest each."""
    batches = [row[0] for row in connection.execute("SELECT DISTINCT batch_id FROM flows ORDER BY 1")]
    day = "(to_timestamp(0) + ('x' || left(replace(f.flow_id::text, '-', ''), 12))::bit(48)::bigint * '1ms'::interval)"
    made = []
    for batch in batches:
        bodies = (
            f"SELECT b.* FROM bodies b WHERE (b.day, b.sha256) IN (SELECT ({day} AT TIME ZONE 'UTC')::date, k"
            f" FROM flows f, unnest(ARRAY[f.request_body_key, f.response_body_key]) k WHERE f.batch_id = {batch})"
        )
        flows = f"SELECT * FROM flows WHERE batch_id = {batch} ORDER BY flow_id"
        made.append({"bodies": _out(connection, bodies), "flows": _out(connection, flows)})
    return made


def _out(connection: psycopg.Connection, query: str) -> bytes:
    with connection.cursor().copy(f"COPY ({query}) TO STDOUT (FORMAT binary)") as copy:
        return b"".join(bytes(part) for part in copy)


def _empty(connection: psycopg.Connection) -> None:
    connection.execute("TRUNCATE flows, bodies, feed, counters, accounting, rollups")
    connection.execute("CHECKPOINT")


@dataclass(frozen=True, slots=True)
class Throughput:
    ingest: list[float]
    copy: list[float]
    bytes_per_flow: float
    record_bytes: float


def throughput(url: str, rows: int, rounds: int) -> Throughput:
    rng = random.Random(1)
    values = [events.encode(a_flow(rng, n + 1)) for n in range(rows)]
    ours: list[float] = []
    theirs: list[float] = []
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")  # COPY keeps no rollups: that is ingest's own work
        say(f"{rows} flows of {sum(map(len, values)) / rows:.0f} bytes; warming up")
        asyncio.run(ingest_all(url, values, "warm"))
        packed = _prepacked(connection)
        size = connection.execute(
            "SELECT sum(pg_total_relation_size(relid)) FROM"
            " (SELECT relid FROM pg_partition_tree('flows') UNION ALL SELECT relid FROM pg_partition_tree('bodies')) t"
        ).fetchone()
        assert size is not None
        for number in range(rounds):
            _empty(connection)
            theirs.append(rows / _copy(connection, packed))
            _check(connection, rows)
            _empty(connection)
            ours.append(rows / asyncio.run(ingest_all(url, values, f"round {number}")))
            _check(connection, rows)
            say(f"round {number + 1}: COPY {theirs[-1]:,.0f} rows/s, ingest {ours[-1]:,.0f} rows/s")
    return Throughput(ours, theirs, float(size[0]) / rows, sum(map(len, values)) / rows)


def _check(connection: psycopg.Connection, rows: int) -> None:
    found = connection.execute("SELECT count(*) FROM flows").fetchone()
    assert found == (rows,), found


def queryable(url: str, data_dir: DataDir, rate: float, seconds: float) -> list[float]:
    """Seconds from append to visible, a flow each."""
    rng = random.Random(2)
    command = [
        sys.executable, "-m", "megido_ingest", "--data-dir", str(data_dir.root), "--database-url", url,
        "--metrics-port", "0", "--log-dir", str(data_dir.root / "logs"),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            return _measured(url, data_dir, rng, rate, seconds)
        finally:
            process.terminate()
            process.wait(20)


def _measured(url: str, data_dir: DataDir, rng: random.Random, rate: float, seconds: float) -> list[float]:
    journal = Journal.open(data_dir, "capture")
    count = int(rate * seconds)
    appended: dict[bytes, float] = {}
    seen: dict[bytes, float] = {}
    watching = threading.Thread(target=_watch, args=(url, seen, count), daemon=True)
    watching.start()
    begun = time.perf_counter()
    for n in range(count):
        flow = a_flow(rng, journal.next_seq())
        time.sleep(max(0.0, begun + n / rate - time.perf_counter()))
        appended[flow.flow_id] = time.perf_counter()
        assert journal.publish(flow)
    watching.join(30)
    journal.close()
    assert seen.keys() == appended.keys(), f"{len(seen)} of {len(appended)} flows were found"
    return [seen[flow_id] - at for flow_id, at in appended.items()]


def _watch(url: str, seen: dict[bytes, float], count: int) -> None:
    """Asks for what is newer than the newest flow seen, every few milliseconds. One worker stores one journal in
    order, so nothing older appears later."""
    newest = ids.floor_id(datetime.now(UTC))
    deadline = time.perf_counter() + 120
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        while len(seen) < count and time.perf_counter() < deadline:
            found = connection.execute(
                "SELECT flow_id FROM flows WHERE flow_id > %s ORDER BY flow_id", [newest]
            ).fetchall()
            now = time.perf_counter()
            seen.update((row[0].bytes, now) for row in found)
            if found:
                newest = found[-1][0]
            time.sleep(0.003)


def main(argv: Collection[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench-ingest", description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="flows a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of each, in turns (default %(default)s)")
    parser.add_argument("--rate", type=float, default=300.0, help="flows/s of the latency run (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the latency run (default %(default)s)")
    parser.add_argument("--short", action="store_true", help="a quick look: 4,000 rows, 3 rounds, 5 s")
    given = parser.parse_args(None if argv is None else list(argv))
    if given.short:
        given.rows, given.rounds, given.seconds = 4_000, 3, 5.0
    tune_interpreter()
    with tempfile.TemporaryDirectory(prefix="megido-bench-") as name:
        data_dir = DataDir(Path(name) / "data").ensure()
        server = EmbeddedPostgres(data_dir)
        url = server.start()
        try:
            migrate(url)
            stored = throughput(url, given.rows, given.rounds)
            say(f"latency: {given.rate:g} flows/s for {given.seconds:g} s through a running megido ingest")
            waits = queryable(url, data_dir, given.rate, given.seconds)
            version = _server_version(url)
        finally:
            server.stop()
    percentiles = quantiles(waits, n=100)
    finish(
        "ingest",
        {
            "copy_ratio": ratio(stored.ingest, stored.copy),
            "ingest_rows_per_s": round(median(stored.ingest)),
            "copy_rows_per_s": round(median(stored.copy)),
            "bytes_per_flow": round(stored.bytes_per_flow),
            "queryable_p50_s": round(median(waits), 3),
            "queryable_p99_s": round(percentiles[98], 3),
        },
        detail={
            "rows_a_round": given.rows,
            "rows_a_commit": BATCH,
            "record_bytes": round(stored.record_bytes),
            "ingest_rounds": [round(rate) for rate in stored.ingest],
            "copy_rounds": [round(rate) for rate in stored.copy],
            "latency_flows": len(waits),
            "latency_rate": given.rate,
            "queryable_max_s": round(max(waits), 3),
            "postgres": version,
        },
        packages=("psycopg", "msgspec", "zstandard", "sqlalchemy"),
    )


def _server_version(url: str) -> str:
    with psycopg.connect(conninfo(url)) as connection:
        found = connection.execute("SHOW server_version").fetchone()
        assert found is not None
        return str(found[0])


if __name__ == "__main__":
    main()
