"""One item from claim to outcome: load, check, begin, send, record.

The order is what the promises rest on. The row says `sent` and the journal says `begun` before the first byte
leaves, and the flow is in the journal before the row says how it ended. So whatever instant a kill comes in,
the request is not sent a second time, and what is not known is called unknown.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Literal

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_replayer import queries
from megido_replayer.addresses import Gate, Refused, Unresolved
from megido_replayer.metrics import Metrics
from megido_replayer.prepare import CannotReplay, Prepared, prepare
from megido_replayer.queries import Item, Outcome
from megido_replayer.recording import Recorder, Sent
from megido_replayer.redirects import next_request
from megido_replayer.target import BadTarget
from megido_replayer.transport import Origin, RawResponse, Sender, SendError, Unsendable
from megido_replayer.transport.wire import render
from megido_shared import ids
from megido_shared.clock import Clock
from megido_shared.db.read import load_flow
from megido_shared.errors import Unavailable
from megido_shared.events import ErrorType, Timing
from megido_shared.replay import ReplayOptions

_log = logging.getLogger(__name__)

NOT_RECORDED = "the answer came but could not be recorded: the journal is full or its disk is"

type Ran = Literal["done", "lost"]
"""`lost`: the item was not sent, because it or its job is not ours to run any more."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What every attempt of a process shares. `me` is the name in `claimed_by`."""

    engine: AsyncEngine
    sender: Sender
    recorder: Recorder
    clock: Clock
    me: str
    lease_s: float
    max_body_size: int
    metrics: Metrics


class Attempt:
    """Runs the items of one job, one call an item. `gate` is the job's own: it resolves a name once."""

    def __init__(self, tools: Tools, options: ReplayOptions, gate: Gate) -> None:
        self._tools = tools
        self._options = options
        self._gate = gate

    async def run(self, item: Item) -> Ran:
        """Raises Unavailable and DBAPIError when the item could not be begun; it is `claimed` then, or back in the
        queue. After the begin it returns only when the outcome is in the row."""
        started = time.monotonic()
        try:
            sent, origin = await self._ready(item)
        except (CannotReplay, BadTarget, Refused, Unsendable) as error:
            await self._finish(item, Outcome("failed", error=str(error)), started)
            return "done"
        except (DBAPIError, Unavailable):
            raise
        except Exception as error:  # noqa: BLE001 - one bad row must not hold up its job for ever
            _log.warning("item %s of job %s cannot be read", item.position, item.job_id, exc_info=error)
            await self._finish(item, Outcome("failed", error=f"the stored request cannot be read: {error}"), started)
            return "done"
        if isinstance(origin, SendError):
            await self._finish(item, self._record_failure(sent, origin), started)
            return "done"
        if not await self._begin(sent):
            return "lost"
        await self._finish(item, await self._send_or_unknown(sent, origin, started), started)
        return "done"

    async def _ready(self, item: Item) -> tuple[Sent, Origin | SendError]:
        async with self._tools.engine.connect() as connection:
            flow = await load_flow(connection, item.original_flow_id)
        if flow is None:
            raise CannotReplay(f"request {item.original_id} is not stored (any more)")
        return await self._resolve(item, prepare(flow, self._options))

    async def _resolve(self, item: Item, prepared: Prepared) -> tuple[Sent, Origin | SendError]:
        """The request under a new identity, and where to send it, or why that name has no address."""
        sent = Sent(item, ids.new_id(), prepared, render(prepared.request), self._tools.clock.time_us())
        to = prepared.to
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._options.timeout_s):
                addresses = await self._gate.admit(to.host, to.port, allow_loopback=self._options.allow_loopback)
        except (Unresolved, TimeoutError) as error:
            took = Timing(response_us=int((time.monotonic() - started) * 1e6))
            return sent, SendError(ErrorType.DNS_ERROR, str(error) or f"resolving {to.host} took too long", timing=took)
        return sent, Origin(to.scheme, to.host, to.port, addresses, prepared.sni, self._options.verify_tls)

    async def _begin(self, sent: Sent) -> bool:
        tools, item = self._tools, sent.item
        deviations = sent.prepared.deviations + sent.message.deviations
        flow_id = ids.to_uuid(sent.flow_id)
        async with tools.engine.begin() as connection:
            ours = await queries.begin(
                connection, item, tools.me, flow_id=flow_id, deviations=deviations, lease_s=tools.lease_s
            )
            if not ours:
                return False
        if tools.recorder.begun(item, sent.flow_id, deviations):
            return True
        async with tools.engine.begin() as connection:
            await queries.release(connection, [item], tools.me, state="sent")
        raise Unavailable("the journal cannot take a record, so nothing is sent")

    async def _send_or_unknown(self, sent: Sent, origin: Origin, started: float) -> Outcome:
        try:
            return await self._send(sent, origin, started)
        except Exception:  # noqa: BLE001 - the row must say unknown, whatever went wrong here
            _log.exception("item %s of job %s failed inside the replayer", sent.item.position, sent.item.job_id)
            return Outcome("unknown", error="an error inside the replayer; the request may have been sent")

    async def _send(self, sent: Sent, origin: Origin, started: float) -> Outcome:
        """Sends, follows redirects if asked to, and records each exchange as a flow of its own."""
        tools, options = self._tools, self._options
        most = min(options.max_response_bytes, tools.max_body_size)
        for hops_left in range(max(options.follow_redirects, 0), -1, -1):
            left = options.timeout_s - (time.monotonic() - started)
            try:
                response = await tools.sender.send_wire(sent.message, origin, timeout_s=max(left, 0.001), max_body=most)
            except SendError as error:
                return self._record_failure(sent, error)
            recorded = tools.recorder.completed(sent, response)
            following = await self._following(sent, response) if hops_left else None
            if following is None:
                return self._record_success(sent, response, recorded)
            sent, origin = following
        raise AssertionError("the last hop returns")

    async def _following(self, sent: Sent, response: RawResponse) -> tuple[Sent, Origin] | None:
        """The next request of a redirect that may be followed. One that leads to a refused place ends here."""
        prepared = next_request(sent.prepared, response)
        if prepared is None:
            return None
        try:
            following, origin = await self._resolve(sent.item, prepared)
        except (Refused, Unsendable) as error:
            _log.info("a redirect is not followed: %s", error)
            return None
        return None if isinstance(origin, SendError) else (following, origin)

    def _record_success(self, sent: Sent, response: RawResponse, recorded: bool) -> Outcome:
        self._tools.recorder.ended(sent.item, "succeeded", sent.flow_id)
        return _as_recorded(Outcome("succeeded", response.status, None, ids.to_uuid(sent.flow_id)), recorded)

    def _record_failure(self, sent: Sent, error: SendError) -> Outcome:
        result: Literal["timed_out", "failed"] = "timed_out" if error.error_type is ErrorType.TIMEOUT else "failed"
        recorded = self._tools.recorder.failed(sent, error)
        self._tools.recorder.ended(sent.item, result, sent.flow_id)
        status = error.response.status if error.response else None
        return _as_recorded(Outcome(result, status, str(error), ids.to_uuid(sent.flow_id)), recorded)

    async def _finish(self, item: Item, outcome: Outcome, started: float) -> None:
        tools = self._tools

        async def write(connection: AsyncConnection) -> None:
            if not await queries.finish(connection, item, tools.me, outcome):
                _log.warning(
                    "item %s of job %s was taken over; its outcome was %s", item.position, item.job_id, outcome
                )

        await persistently(tools.engine.begin, write)
        tools.metrics.ended(outcome, time.monotonic() - started)


def _as_recorded(outcome: Outcome, recorded: bool) -> Outcome:
    """Nobody may wait for a flow that will never be stored."""
    return outcome if recorded else replace(outcome, result_flow_id=None, error=outcome.error or NOT_RECORDED)


async def persistently[T](
    connect: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
    work: Callable[[AsyncConnection], Awaitable[T]],
    *,
    longest_pause_s: float = 2.0,
) -> T:
    """Does `work` in a transaction, again and again while the database is away. Ends by success or cancelling."""
    pause = 0.1
    while True:
        try:
            async with connect() as connection:
                return await work(connection)
        except DBAPIError as error:
            if not is_away(error):
                raise
            _log.warning("the database is away, trying again: %s", first_line(error))
        await asyncio.sleep(pause)
        pause = min(pause * 2, longest_pause_s)


def is_away(error: DBAPIError) -> bool:
    """Whether trying again later may help: no server, a lost connection, a deadlock, a time limit."""
    state = getattr(error.orig, "sqlstate", None) or ""
    return error.connection_invalidated or not state or state[:2] in ("08", "40", "53", "55", "57")


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
