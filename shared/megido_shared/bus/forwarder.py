"""The forwarder: ships what the journals of a data directory hold to Kafka, or to the API over HTTP.

    python -m megido_shared.bus.forwarder --data-dir D (--kafka HOST:PORT | --api-url URL)

It reads every slot, those whose writer is gone too, in order, and acknowledges a record only when the other side
has it; until then the journal keeps it. It tries again for ever. A crash repeats the last batch: readers dedupe
by event identity. Several forwarders of one directory share the streams.
"""

import argparse
import asyncio
import logging
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import httpx
import msgspec
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as CounterMetric

from megido_shared import events
from megido_shared.bus.base import BEHIND_A_FAILURE, Batch, Bus, Consumer, Outgoing, Producer, Record, Stream
from megido_shared.bus.local import LocalBus, follow, group_is_live
from megido_shared.bus.open import open_bus
from megido_shared.bus.topics import CONFIG, TOPICS
from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError, Unavailable
from megido_shared.ops import OpsServer
from megido_shared.service import guard, setup_logging, stop_on_signals
from megido_shared.settings import Common, common_from_env

GROUP = "forwarder"
INGEST_GROUP = "ingest"
SHIPPED = tuple(topic for topic in TOPICS if topic is not CONFIG)
MAX_RECORDS = 2000
MAX_BYTES = 4 << 20
MAX_RECORD_BYTES = 4_000_000
"""Greater records cannot be shipped (`max.message.bytes`); nothing of ours makes them."""
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 5.0
HTTP_SECONDS = 30.0
SLOW_SECONDS = 3.0
"""How long a batch may be under way before the forwarder says that it is not ready."""
STOP_SECONDS = 1.5
"""What was written before a stop gets half of it to be sent, the rest to be acknowledged; else it is shipped again."""

_log = logging.getLogger("megido.forwarder")


class Shipper(Protocol):
    """The other side. `depth` batches may be under way at a time."""

    depth: int

    async def ship(self, records: Sequence[Outgoing]) -> int:
        """Returns when every record is durable there; how many of them it refused for good. Raises Unavailable; then
        all that are under way, and all that come, do so, until `begin_again`: so the order is kept."""

    async def begin_again(self) -> None:
        """Called after a failure, when nothing is under way."""

    async def close(self) -> None: ...


class KafkaShipper:
    depth = 3

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._producer: Producer | None = None
        self._failed = False
        self._preparing = asyncio.Lock()

    async def ship(self, records: Sequence[Outgoing]) -> int:
        try:
            async with self._preparing:
                if self._failed:
                    raise Unavailable(BEHIND_A_FAILURE)
                if self._producer is None:
                    await self._prepare()
                    self._producer = await self._bus.producer(GROUP, ordered=True)
                producer = self._producer
            await producer.append([with_headers(record) for record in records])
        except BaseException:
            self._failed = True
            raise
        return 0

    async def begin_again(self) -> None:
        """Looks for the topics again too: it may be another, empty Kafka that answers next."""
        producer, self._producer, self._failed = self._producer, None, False
        if producer:
            await producer.close()

    async def close(self) -> None:
        if self._producer:
            await self._producer.close()
        await self._bus.close()

    async def _prepare(self) -> None:
        """A capture node may be the first to meet a new Kafka. Where it may not create topics, others have."""
        try:
            if created := await self._bus.create_topics(TOPICS):
                _log.info("created topics %s", ", ".join(created))
        except ConfigurationError as error:
            _log.warning("%s", error)


class HttpShipper:
    """`POST {api_url}/proxy/api/events/`: MessagePack, a list of [topic, key, value]; idempotent by event id."""

    depth = 1

    def __init__(self, api_url: str, token: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        headers = {"Content-Type": "application/msgpack"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._url = f"{api_url.rstrip('/')}/proxy/api/events/"
        self._client = httpx.AsyncClient(headers=headers, timeout=HTTP_SECONDS, trust_env=False, transport=transport)

    async def ship(self, records: Sequence[Outgoing]) -> int:
        body = msgspec.msgpack.encode([(record.topic, record.key, record.value) for record in records])
        try:
            answer = await self._client.post(self._url, content=body)
        except httpx.HTTPError as error:
            raise Unavailable(f"{self._url}: {type(error).__name__} {error}") from error
        if answer.status_code == 200:
            return 0
        if answer.status_code not in (400, 413, 422):
            raise Unavailable(f"{self._url} answered {answer.status_code}")
        if len(records) > 1:
            # One bad record must not hold up its neighbours.
            half = len(records) // 2
            return await self.ship(records[:half]) + await self.ship(records[half:])
        _log.error("%s refused a record of %s: %s", self._url, records[0].topic, answer.text[:200])
        return 1

    async def begin_again(self) -> None:
        """One batch at a time has no order to lose."""

    async def close(self) -> None:
        await self._client.aclose()


def with_headers(record: Outgoing) -> Outgoing:
    """With CloudEvents headers, if it is an event that we know. An unknown one travels without: ingest says why it
    cannot be stored."""
    try:
        headers = events.cloud_event_headers(events.decode(record.value))
    except msgspec.DecodeError:
        return record
    return Outgoing(record.topic, record.key, record.value, headers)


@dataclass
class Metrics:
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        def counter(name: str, text: str, labels: Sequence[str] = ()) -> CounterMetric:
            return CounterMetric(f"megido_forwarder_{name}", text, labels, registry=self.registry)

        self.shipped = counter("records", "Records that the other side has.", ["topic"])
        self.refused = counter("refused", "Records that the other side will never take.")
        self.retries = counter("retries", "Batches that had to be sent again.")
        self.gaps = counter("gaps", "Records that could not be read from a journal.", ["kind"])
        self.lag = Gauge("megido_forwarder_lag_bytes", "Bytes that are not shipped yet.", registry=self.registry)


class _Flight:
    """A batch on its way."""

    def __init__(self, batch: Batch, records: Sequence[Record]) -> None:
        self.batch = batch
        self.records = records
        self.since = 0.0
        self.task: asyncio.Task[int]

    def start(self, shipper: Shipper) -> None:
        self.since = time.monotonic()
        self.task = asyncio.create_task(self._ship(shipper))

    async def _ship(self, shipper: Shipper) -> int:
        if not self.records:
            return 0
        return await shipper.ship([Outgoing(r.stream.topic, r.key, r.value) for r in self.records])


class Forwarder:
    """`run` until `stop`; `missing` is the answer to a readiness probe."""

    def __init__(self, data_dir: DataDir, shipper: Shipper, *, yields_to_ingest: bool, metrics: Metrics) -> None:
        """`yields_to_ingest`: ship nothing while a live ingest reads the same data directory."""
        self._data_dir = data_dir
        self._shipper = shipper
        self._yields = yields_to_ingest
        self._metrics = metrics
        self._consumer: Consumer | None = None
        self._trouble = ["not started yet"]
        self._under_way: deque[_Flight] = deque()
        self._done: dict[Stream, int] = {}

    def missing(self) -> list[str]:
        """A broker that is away shows long before the producer gives up on it."""
        waited = time.monotonic() - self._under_way[0].since if self._under_way else 0.0
        if not self._trouble and waited > SLOW_SECONDS:
            return [f"a batch has not been taken for {waited:.0f} s"]
        return self._trouble

    async def run(self, stop: asyncio.Event) -> None:
        working = asyncio.create_task(self._work(stop))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                await asyncio.wait([working], timeout=STOP_SECONDS)
            if not working.done():
                working.cancel()
                await asyncio.wait([working], timeout=STOP_SECONDS)
            if working.done() and not working.cancelled():
                working.result()
        finally:
            stopping.cancel()
            await self._recall()
            if self._consumer:
                await self._consumer.close()
            await self._shipper.close()

    async def _work(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            if self._yields and group_is_live(self._data_dir, INGEST_GROUP):
                await self._settle_all()
                await self._stand_aside()
                continue
            consumer = await self._joined()
            if not await self._fill(consumer):
                await asyncio.sleep(FIRST_PAUSE)
                continue
            if self._under_way:
                await self._settle(consumer)
            elif self._done:
                await self._acknowledge(consumer)
            self._metrics.lag.set(sum((await consumer.lag()).values()))
        await self._ship_the_rest()

    async def _ship_the_rest(self) -> None:
        """What was written until the stop: a service stops its forwarder last, and waits a moment for it."""
        begins_until = time.monotonic() + STOP_SECONDS / 2
        while self._consumer is not None and time.monotonic() < begins_until:
            if not await self._fill(self._consumer, wait=0.0) or not self._under_way:
                break
            await self._settle(self._consumer)
        await self._settle_all()

    async def _fill(self, consumer: Consumer, wait: float = 0.5) -> bool:
        """Begins to ship what there is; waits for something only while nothing is under way. False: the journals
        cannot be read."""
        while len(self._under_way) < self._shipper.depth:
            timeout = 0.0 if self._under_way else wait
            try:
                batch = await consumer.poll(max_records=MAX_RECORDS, max_bytes=MAX_BYTES, timeout=timeout)
            except Unavailable as error:
                self._report(str(error))
                return False
            if not batch:
                break
            self._begin(batch)
        return True

    async def _joined(self) -> Consumer:
        if self._consumer is None:
            self._consumer = await LocalBus(self._data_dir).consumer(GROUP, SHIPPED, pins=True)
            self._trouble = []
        return self._consumer

    async def _stand_aside(self) -> None:
        """Ingest has the journals: keep up with what it acknowledges, so that nothing is pinned or told twice."""
        if self._consumer:
            await self._consumer.close()
            self._consumer = None
        await asyncio.to_thread(follow, self._data_dir, INGEST_GROUP, GROUP)
        self._trouble = []
        await asyncio.sleep(1.0)

    def _begin(self, batch: Batch) -> None:
        for gap in batch.gaps:
            self._metrics.gaps.labels(gap.kind).inc(gap.count)
            _log.warning("journal %s: %s at %d, %d records", gap.stream.source_id, gap.kind, gap.offset, gap.count)
        flight = _Flight(batch, [record for record in batch.records if self._fits(record)])
        flight.start(self._shipper)
        self._under_way.append(flight)

    async def _settle_all(self) -> None:
        while self._under_way:
            await self._settle(await self._joined())

    async def _settle(self, consumer: Consumer) -> None:
        """Waits until the oldest batch is taken, however long that lasts, and acknowledges it. When it fails, it and
        all that were begun behind it are shipped again, in order."""
        flight = self._under_way[0]
        pause = FIRST_PAUSE
        while True:
            try:
                refused = await flight.task
                break
            except Unavailable as error:
                self._report(str(error))
            await self._recall()
            await self._shipper.begin_again()
            await asyncio.sleep(pause * random.uniform(0.7, 1.3))
            pause = min(2 * pause, LONGEST_PAUSE)
            for again in self._under_way:
                self._metrics.retries.inc()
                again.start(self._shipper)
        self._trouble = []
        self._metrics.refused.inc(refused)
        for topic, count in Counter(record.stream.topic for record in flight.records).items():
            self._metrics.shipped.labels(topic).inc(count)
        self._under_way.popleft()
        self._done |= flight.batch.positions()
        await self._acknowledge(consumer)

    async def _acknowledge(self, consumer: Consumer) -> None:
        """Frees the journal of what is shipped. Where that cannot be written down, it is tried again later."""
        try:
            await consumer.commit(self._done)
            self._done.clear()
        except Unavailable as error:
            self._report(str(error))

    async def _recall(self) -> None:
        """Ends what is under way; some of it may have arrived all the same."""
        tasks = [flight.task for flight in self._under_way]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fits(self, record: Record) -> bool:
        if len(record.value) <= MAX_RECORD_BYTES:
            return True
        self._metrics.refused.inc()
        _log.error("a record of %d bytes on %s cannot be shipped", len(record.value), record.stream.topic)
        return False

    def _report(self, trouble: str) -> None:
        if self._trouble != [trouble]:
            _log.warning("%s; the journal keeps everything, trying again", trouble)
        self._trouble = [trouble]


def make_shipper(common: Common, api_url: str, env: Mapping[str, str]) -> Shipper:
    """Kafka if it is configured, else the API. Raises ConfigurationError."""
    if common.kafka:
        return KafkaShipper(open_bus(common, env))
    if not api_url:
        raise ConfigurationError("the forwarder needs to know where to: --kafka HOST:PORT or --api-url URL")
    if not api_url.startswith(("http://", "https://")):
        raise ConfigurationError(f"--api-url must begin with http:// or https://, not {api_url!r}")
    return HttpShipper(api_url, env.get("MEGIDO_API_TOKEN", ""))


async def serve(common: Common, api_url: str, metrics_port: int | None) -> None:
    stop = stop_on_signals()
    metrics = Metrics()
    shipper = make_shipper(common, api_url, os.environ)
    forwarder = Forwarder(common.data_dir.ensure(), shipper, yields_to_ingest=not common.kafka, metrics=metrics)
    ops = None if metrics_port is None else OpsServer(metrics.registry, forwarder.missing, port=metrics_port)
    port = f", metrics on 127.0.0.1:{ops.port}" if ops else ""
    sys.stdout.write(f"forwarding {common.data_dir.root} to {common.kafka or api_url}{port}\n")
    sys.stdout.flush()
    try:
        await forwarder.run(stop)
    finally:
        if ops:
            ops.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megido-forwarder", description="Ships journals to Kafka or to the API.")
    parser.add_argument("--data-dir", default="", help="whose journals (MEGIDO_DATA_DIR)")
    parser.add_argument("--kafka", default="", help="host:port[,…] of the brokers (MEGIDO_KAFKA)")
    parser.add_argument("--api-url", default=os.environ.get("PROXY_API_URL", ""), help="the API, used without Kafka")
    parser.add_argument("--metrics-port", type=int, help="serve /livez, /readyz and /metrics on loopback; 0: any")
    arguments = parser.parse_args(argv)

    def run() -> None:
        setup_logging()
        common = common_from_env(os.environ, data_dir=arguments.data_dir, kafka=arguments.kafka)
        asyncio.run(serve(common, arguments.api_url, arguments.metrics_port))

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
