"""Reads a data directory's journal as ingest does, and frees it, but stores nothing: for runs that would fill a disk.

Counts what it read, and says so as one JSON object once its standard input has ended and the journal is empty.
"""

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

from megido_shared import events
from megido_shared.bus.local import LocalBus
from megido_shared.bus.topics import INGESTED
from megido_shared.datadir import DataDir
from megido_shared.events import FlowCompleted, WebSocketMessage

GROUP = "ingest"
"""Its name tells the proxy, too, that the history is looked after: it then asks no API for its configuration."""


async def drain(data_dir: Path) -> Counter[str]:
    """Counts by event type; messages by direction and type; bytes of bodies that passed by `request`, `response`."""
    counts: Counter[str] = Counter()
    ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    consumer = await LocalBus(DataDir(data_dir)).consumer(GROUP, INGESTED, pins=True)
    while True:
        over = ended.done()
        batch = await consumer.poll(timeout=0.5)
        for record in batch.records:
            count(counts, events.decode(record.value))
        counts.update(f"gap:{gap.kind}" for gap in batch.gaps)
        await consumer.commit(batch.positions())
        if over and not batch:
            await consumer.close()
            return counts


def count(counts: Counter[str], event: events.AnyEvent) -> None:
    counts[type(event).__name__] += 1
    if isinstance(event, WebSocketMessage):
        counts[f"{event.direction} {event.message_type}"] += 1
    elif isinstance(event, FlowCompleted) and event.response is not None:
        counts["request bytes"] += event.request.body.size
        counts["response bytes"] += event.response.body.size


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drain(Path(sys.argv[1])))), flush=True)
