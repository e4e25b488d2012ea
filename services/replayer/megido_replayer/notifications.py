"""Commands on the bus: notifications that there is something to claim. Losing one delays it to the next poll."""

import asyncio
import logging

from megido_replayer.health import Health
from megido_shared.bus.base import Bus, Consumer
from megido_shared.bus.topics import REPLAY_COMMANDS, TOPICS
from megido_shared.errors import Unavailable

GROUP = "replayer"
_PAUSE_S = 2.0

_log = logging.getLogger(__name__)


async def listen(bus: Bus, wake: asyncio.Event, health: Health) -> None:
    """Sets `wake` for every command, until cancelled. A bus that is away is tried again."""
    while True:
        consumer: Consumer | None = None
        try:
            await bus.create_topics(TOPICS)  # a replayer may be the first to meet a new Kafka
            consumer = await bus.consumer(GROUP, [REPLAY_COMMANDS])
            await _consume(consumer, wake, health)
        except Unavailable as error:
            health.bad("bus", str(error))
            _log.warning("replay commands cannot be read now, jobs are found by polling: %s", error)
        finally:
            if consumer is not None:
                await consumer.close()
        await asyncio.sleep(_PAUSE_S)


async def _consume(consumer: Consumer, wake: asyncio.Event, health: Health) -> None:
    while True:
        batch = await consumer.poll(timeout=1.0)
        health.good("bus")
        if batch:
            wake.set()
            await consumer.commit(batch.positions())
