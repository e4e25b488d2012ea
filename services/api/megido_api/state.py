"""What one running API holds, and how endpoints come by it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry

from megido_api.database import Database, Work
from megido_api.publishing import Origin
from megido_api.settings import Settings
from megido_shared.bus.base import Bus
from megido_shared.clock import Clock
from megido_shared.db.outbox import Relay


@dataclass(frozen=True, slots=True)
class State:
    """`config_changed` makes running proxies get the new rules and settings. `stopping` is set when the process is
    told to stop: what waits for something gives up."""

    settings: Settings
    database: Database
    bus: Bus
    relay: Relay
    clock: Clock
    config_changed: Callable[[], None]
    registry: CollectorRegistry
    stopping: asyncio.Event
    origin: Origin = field(default_factory=Origin)

    async def publish[T](self, work: Work[T]) -> T:
        """One transaction that adds to the outbox; its records are on their way when this returns."""
        result = await self.database.write(work)
        self.relay.wake()
        return result


def _state(request: Request) -> State:
    found = request.app.state.megido
    assert isinstance(found, State)
    return found


StateDep = Annotated[State, Depends(_state)]
