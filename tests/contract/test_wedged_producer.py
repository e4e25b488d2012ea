"""An idempotent producer that can never succeed again is given up and replaced, and its records arrive in order."""

import asyncio
import shutil

import pytest
from scripts.kafka import Node

from megido_shared.bus.base import Outgoing
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.topics import Topic
from megido_shared.errors import Unavailable

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

TOPIC = Topic("wedged", 1, "delete", "key")


def records(start: int, stop: int) -> list[Outgoing]:
    return [Outgoing(TOPIC.name, b"k", b"%d" % number) for number in range(start, stop)]


async def test_a_producer_whose_sequence_numbers_are_refused_is_replaced(fresh_kafka: Node) -> None:
    """The broker comes back empty and gives the producer's id to somebody else, whose numbers are others: ours are
    out of order from now on, which the client takes as fatal (aiokafka #1017)."""
    bus = KafkaBus(fresh_kafka.bootstrap)
    await bus.create_topics([TOPIC])
    wedged = await bus.producer("ours", ordered=True)
    await wedged.append(records(0, 5))
    fresh_kafka.kill()
    shutil.rmtree(fresh_kafka.data / "logs")
    await asyncio.to_thread(fresh_kafka.start)
    await bus.create_topics([TOPIC])
    others = await bus.producer("others")
    await others.append(records(100, 120))
    overlapping = [asyncio.create_task(wedged.append(records(5 + 5 * n, 10 + 5 * n))) for n in range(3)]
    failed = await asyncio.gather(*overlapping, return_exceptions=True)
    assert all(isinstance(error, Unavailable) for error in failed), "not wedged, so this proves nothing"
    assert "OutOfOrder" in str(failed[0])
    with pytest.raises(Unavailable, match="before this one failed"):
        await wedged.append(records(5, 10))
    again = await bus.producer("ours", ordered=True)
    await asyncio.gather(*(again.append(records(5 + 5 * n, 10 + 5 * n)) for n in range(3)))
    consumer = await bus.consumer("readers", [TOPIC])
    found: list[int] = []
    async with asyncio.timeout(60):
        while 19 not in found:
            found += [int(record.value) for record in (await consumer.poll()).records]
    assert found == [*range(100, 120), *range(5, 20)]
    for closing in (consumer, wedged, again, others, bus):
        await closing.close()
