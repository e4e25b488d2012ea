"""After a death: what the rows say that we held, and what our own journal knows about it.

Claimed but never marked `sent` → back into the queue. Marked `sent`: completed from the journal when the flow is
in it, or from the stored flow when the journal's segment is gone already; otherwise `unknown`, for safe methods
too: that the row says `sent` and the journal has no `begun` is not proof enough to send again.
"""

import asyncio
import logging
from collections.abc import Collection

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_replayer import queries
from megido_replayer.queries import Final, Item, Outcome
from megido_shared import events, ids
from megido_shared.bus.local import Journal
from megido_shared.bus.topics import FLOWS, REPLAY_RESULTS
from megido_shared.events import ErrorType, FlowCompleted, FlowFailed, ReplayProgressed

_log = logging.getLogger(__name__)

type Key = tuple[bytes, int, int]
"""(job id, position, attempt)."""


async def recover(engine: AsyncEngine, journal: Journal, me: str) -> int:
    """Settles every item that `me` holds; returns how many. Nothing of them may be under way. Raises DBAPIError."""
    async with engine.connect() as connection:
        held = await queries.held(connection, me)
    if not held:
        return 0
    sent = {_key(item): flow.bytes for item, state, flow in held if state == "sent" and flow is not None}
    told = await asyncio.to_thread(_from_journal, journal, sent) if sent else {}
    async with engine.begin() as connection:
        for item, state, _ in held:
            await _settle(connection, item, state, me, told.get(_key(item)))
    _log.info("settled %d items that were claimed when the replayer ended", len(held))
    return len(held)


async def _settle(connection: AsyncConnection, item: Item, state: str, me: str, told: Outcome | None) -> None:
    if state == "claimed":
        await queries.release(connection, [item], me)
        return
    await queries.finish(connection, item, me, await _outcome(connection, told))


async def _outcome(connection: AsyncConnection, told: Outcome | None) -> Outcome:
    if told is None:
        return Outcome("unknown", error=queries.UNKNOWN_ERROR)
    if told.state == "unknown" and told.result_flow_id is not None:
        # Only its identity is known from the journal: the flow itself may be stored, and freed here.
        return await queries.stored_outcome(connection, told.result_flow_id) or Outcome(
            "unknown", error=queries.UNKNOWN_ERROR
        )
    return told


def _from_journal(journal: Journal, sent: dict[Key, bytes]) -> dict[Key, Outcome]:
    """What the journal tells about each item; `unknown` with a flow's id when it does not have that flow."""
    flow_ids = dict(sent)
    for record in journal.read_back(REPLAY_RESULTS.name):
        progress = _decode(record.value)
        if isinstance(progress, ReplayProgressed):
            key = (progress.job_id, progress.position, progress.attempt)
            if key in flow_ids and progress.flow_id:
                flow_ids[key] = progress.flow_id  # after a redirect the result's, not the begun one's
    flows = _flows(journal, set(flow_ids.values()))
    return {
        key: _told_by(flows[flow_id]) if flow_id in flows else Outcome("unknown", result_flow_id=ids.to_uuid(flow_id))
        for key, flow_id in flow_ids.items()
    }


def _flows(journal: Journal, wanted: Collection[bytes]) -> dict[bytes, FlowCompleted | FlowFailed]:
    found: dict[bytes, FlowCompleted | FlowFailed] = {}
    for record in journal.read_back(FLOWS.name):
        if record.key in wanted:
            event = _decode(record.value)
            if isinstance(event, FlowCompleted | FlowFailed):
                found[record.key] = event
    return found


def _told_by(event: FlowCompleted | FlowFailed) -> Outcome:
    status = event.response.status if event.response else None
    flow_id = ids.to_uuid(event.flow_id)
    if isinstance(event, FlowCompleted):
        return Outcome("succeeded", status, None, flow_id)
    state: Final = "timed_out" if event.failure.error_type is ErrorType.TIMEOUT else "failed"
    return Outcome(state, status, event.failure.message, flow_id)


def _decode(value: bytes) -> events.AnyEvent | None:
    """None for what another version wrote and this one cannot read."""
    try:
        return events.decode(value)
    except (msgspec.ValidationError, msgspec.DecodeError):
        return None


def _key(item: Item) -> Key:
    return (item.job_id.bytes, item.position, item.attempt)
