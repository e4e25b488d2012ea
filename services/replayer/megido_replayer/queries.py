"""All SQL of the replayer. Items are claimed, begun and finished under (claimed_by, attempt): whoever lost an item
to an expired lease can change it no more. The server's clock alone decides about leases."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.events import Rank

type Final = Literal["succeeded", "failed", "timed_out", "skipped", "cancelled", "unknown"]

UNKNOWN_ERROR = "the replayer ended while the request was on its way: it may have been acted upon"


@dataclass(frozen=True, slots=True)
class Job:
    job_id: uuid.UUID
    options: dict[str, object]


@dataclass(frozen=True, slots=True)
class Item:
    """One claimed item; `attempt` counts its claims."""

    job_id: uuid.UUID
    position: int
    attempt: int
    original_flow_id: uuid.UUID
    original_id: int

    def key(self) -> dict[str, Any]:
        return {"job": self.job_id, "position": self.position, "attempt": self.attempt}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an item ended. `result_flow_id` names a flow that is stored, or will be once it is ingested; None when
    nothing was sent."""

    state: Final
    status: int | None = None
    error: str | None = None
    result_flow_id: uuid.UUID | None = None


_OPEN_JOBS = text("""
    SELECT job_id, options FROM replay_jobs
    WHERE state IN ('queued', 'running') ORDER BY job_id LIMIT :most
""")

_START_JOB = text("""
    UPDATE replay_jobs SET state = 'running', updated_at = now() WHERE job_id = :job AND state = 'queued'
""")

# What a run of this process left claimed when the database went away in the middle.
_RELEASE_JOB = text("""
    UPDATE replay_items
    SET state = 'queued', claimed_by = NULL, lease_until = NULL, updated_at = now()
    WHERE job_id = :job AND state = 'claimed' AND claimed_by = :me
""")

_JOB_STATE = text("SELECT state FROM replay_jobs WHERE job_id = :job")

# The job's row serialises the claims of several replayers, which is what lets an ordered job keep its order.
_LOCK_JOB = text("SELECT 1 FROM replay_jobs WHERE job_id = :job AND state = 'running' FOR UPDATE SKIP LOCKED")

_HELD_BY_OTHERS = text("""
    SELECT EXISTS (SELECT FROM replay_items
                   WHERE job_id = :job AND state IN ('claimed', 'sent') AND claimed_by <> :me)
""")

_CLAIM = text("""
    UPDATE replay_items i
    SET state = 'claimed', attempt = i.attempt + 1, claimed_by = :me,
        lease_until = now() + make_interval(secs => :lease_s), result_flow_id = NULL, updated_at = now()
    FROM (SELECT job_id, position FROM replay_items WHERE job_id = :job AND state = 'queued'
          ORDER BY position LIMIT :most FOR UPDATE SKIP LOCKED) free
    WHERE i.job_id = free.job_id AND i.position = free.position
    RETURNING i.job_id, i.position, i.attempt, i.original_flow_id, i.original_id
""")

_BEGIN = text("""
    UPDATE replay_items i
    SET state = 'sent', result_flow_id = :flow, deviations = :deviations,
        lease_until = now() + make_interval(secs => :lease_s), updated_at = now()
    FROM replay_jobs j
    WHERE i.job_id = :job AND i.position = :position AND i.attempt = :attempt AND i.claimed_by = :me
      AND i.state = 'claimed' AND j.job_id = i.job_id AND j.state = 'running'
""")

_FINISH = text("""
    UPDATE replay_items
    SET state = :state, status = :status, error = :error, result_flow_id = :flow, lease_until = NULL,
        updated_at = now()
    WHERE job_id = :job AND position = :position AND attempt = :attempt AND claimed_by = :me
      AND state IN ('claimed', 'sent', 'unknown')
""")

_RELEASE = text("""
    UPDATE replay_items
    SET state = 'queued', claimed_by = NULL, lease_until = NULL, result_flow_id = NULL, updated_at = now()
    WHERE job_id = :job AND position = :position AND attempt = :attempt AND claimed_by = :me AND state = :state
""")

_RENEW = text("""
    UPDATE replay_items SET lease_until = now() + make_interval(secs => :lease_s)
    WHERE state IN ('claimed', 'sent') AND job_id = ANY(:jobs) AND claimed_by = :me
""")

_HELD = text("""
    SELECT job_id, position, attempt, original_flow_id, original_id, state, result_flow_id FROM replay_items
    WHERE state IN ('claimed', 'sent') AND claimed_by = :me ORDER BY job_id, position
""")

_EXPIRE_CLAIMED = text("""
    UPDATE replay_items SET state = 'queued', claimed_by = NULL, lease_until = NULL, updated_at = now()
    WHERE state = 'claimed' AND lease_until < now()
""")

# A replayer that died behind its journal's append left the flow to be ingested: then the outcome is known.
_EXPIRE_STORED = text("""
    UPDATE replay_items i
    SET state = CASE WHEN f.rank = :completed THEN 'succeeded' WHEN f.error_type = 'TIMEOUT' THEN 'timed_out'
                     ELSE 'failed' END,
        status = f.status, error = f.error_message, lease_until = NULL, updated_at = now()
    FROM flows f
    WHERE i.state = 'sent' AND i.lease_until < now() AND f.flow_id = i.result_flow_id AND f.rank >= :failed
""")

_EXPIRE_SENT = text("""
    UPDATE replay_items
    SET state = 'unknown', error = :error, result_flow_id = NULL, lease_until = NULL, updated_at = now()
    WHERE state = 'sent' AND lease_until < now()
""")

_STORED_FLOW = text(
    "SELECT rank, status, error_type, error_message FROM flows WHERE flow_id = :flow AND rank >= :failed"
)

_CANCEL_ITEMS = text("""
    UPDATE replay_items i SET state = 'cancelled', claimed_by = NULL, lease_until = NULL, updated_at = now()
    FROM replay_jobs j
    WHERE i.state = 'queued' AND j.job_id = i.job_id AND j.state = 'cancelled'
""")

_FAIL_JOB = text("""
    UPDATE replay_jobs SET state = 'failed', updated_at = now() WHERE job_id = :job AND state IN ('queued', 'running')
""")

_FAIL_ITEMS = text("""
    UPDATE replay_items SET state = 'failed', error = :error, updated_at = now()
    WHERE job_id = :job AND state = 'queued'
""")

_FINISH_JOB = text("""
    UPDATE replay_jobs j
    SET updated_at = now(), state = CASE
        WHEN EXISTS (SELECT FROM replay_items i WHERE i.job_id = j.job_id)
         AND NOT EXISTS (SELECT FROM replay_items i WHERE i.job_id = j.job_id
                         AND (i.result_flow_id IS NOT NULL OR i.state <> 'failed'))
        THEN 'failed' ELSE 'done' END
    WHERE j.job_id = :job AND j.state = 'running'
      AND NOT EXISTS (SELECT FROM replay_items i WHERE i.job_id = j.job_id AND i.state IN ('queued', 'claimed', 'sent'))
""")

_LISTENING = text("""
    SELECT DISTINCT listen FROM nodes
    WHERE listen <> '' AND state <> 'stopping' AND seen_at > now() - interval '10 minutes'
""")


async def open_jobs(connection: AsyncConnection, most: int) -> list[Job]:
    """Those with something to do, the oldest first."""
    return [Job(row.job_id, row.options) for row in await connection.execute(_OPEN_JOBS, {"most": most})]


async def start_job(connection: AsyncConnection, job_id: uuid.UUID, me: str) -> None:
    """Before this process runs some of it; nothing of it may be under way here."""
    await connection.execute(_START_JOB, {"job": job_id})
    await connection.execute(_RELEASE_JOB, {"job": job_id, "me": me})


async def job_state(connection: AsyncConnection, job_id: uuid.UUID) -> str | None:
    state: str | None = await connection.scalar(_JOB_STATE, {"job": job_id})
    return state


async def fail_job(connection: AsyncConnection, job_id: uuid.UUID, error: str) -> None:
    """A job that cannot run at all: every queued item fails with the reason."""
    await connection.execute(_FAIL_ITEMS, {"job": job_id, "error": error})
    await connection.execute(_FAIL_JOB, {"job": job_id})


async def finish_job(connection: AsyncConnection, job_id: uuid.UUID) -> bool:
    """`done`, or `failed` when nothing could be sent; False while items are open."""
    return bool((await connection.execute(_FINISH_JOB, {"job": job_id})).rowcount)


async def claim(
    connection: AsyncConnection, job_id: uuid.UUID, me: str, *, most: int, lease_s: float, ordered: bool
) -> list[Item]:
    """The next queued items, now ours. None of an `ordered` job while another replayer holds some of it."""
    if await connection.scalar(_LOCK_JOB, {"job": job_id}) is None:
        return []
    if ordered and await connection.scalar(_HELD_BY_OTHERS, {"job": job_id, "me": me}):
        return []
    rows = await connection.execute(_CLAIM, {"job": job_id, "me": me, "most": most, "lease_s": lease_s})
    return sorted((Item(*row) for row in rows), key=lambda item: item.position)


async def begin(
    connection: AsyncConnection, item: Item, me: str, *, flow_id: uuid.UUID, deviations: Sequence[str], lease_s: float
) -> bool:
    """Marks it `sent`. False: it is not ours any more, or its job does not run any more; do not send."""
    values = {**item.key(), "me": me, "flow": flow_id, "deviations": list(deviations), "lease_s": lease_s}
    return (await connection.execute(_BEGIN, values)).rowcount == 1


async def finish(connection: AsyncConnection, item: Item, me: str, outcome: Outcome) -> bool:
    """Writes the outcome, also over an `unknown` that an expired lease left meanwhile."""
    values = {
        **item.key(),
        "me": me,
        "state": outcome.state,
        "status": outcome.status,
        "error": _storable(outcome.error),
        "flow": outcome.result_flow_id,
    }
    return (await connection.execute(_FINISH, values)).rowcount == 1


async def release(
    connection: AsyncConnection, items: Sequence[Item], me: str, *, state: Literal["claimed", "sent"] = "claimed"
) -> None:
    """Back into the queue: nothing of them was sent."""
    for item in items:
        await connection.execute(_RELEASE, {**item.key(), "me": me, "state": state})


async def renew(connection: AsyncConnection, me: str, jobs: Sequence[uuid.UUID], lease_s: float) -> None:
    """The leases of what is under way here."""
    await connection.execute(_RENEW, {"me": me, "jobs": list(jobs), "lease_s": lease_s})


async def held(connection: AsyncConnection, me: str) -> list[tuple[Item, str, uuid.UUID | None]]:
    """(item, state, result_flow_id) of what this node had claimed before it died."""
    rows = await connection.execute(_HELD, {"me": me})
    return [(Item(*row[:5]), row.state, row.result_flow_id) for row in rows]


async def expire(connection: AsyncConnection) -> None:
    """Takes items from replayers that do not renew their leases: not begun → queued, sent → the outcome if its
    flow is stored, else unknown. Items of cancelled jobs that nobody holds are cancelled."""
    await connection.execute(_EXPIRE_CLAIMED)
    await connection.execute(_EXPIRE_STORED, {"completed": Rank.COMPLETED, "failed": Rank.FAILED})
    await connection.execute(_EXPIRE_SENT, {"error": UNKNOWN_ERROR})
    await connection.execute(_CANCEL_ITEMS)


async def stored_outcome(connection: AsyncConnection, flow_id: uuid.UUID) -> Outcome | None:
    """The outcome that a stored flow tells."""
    row = (await connection.execute(_STORED_FLOW, {"flow": flow_id, "failed": Rank.FAILED})).first()
    if row is None:
        return None
    if row.rank == Rank.COMPLETED:
        return Outcome("succeeded", row.status, None, flow_id)
    state: Final = "timed_out" if row.error_type == "TIMEOUT" else "failed"
    return Outcome(state, row.status, row.error_message, flow_id)


async def listening(connection: AsyncConnection) -> list[str]:
    """Where Megido's nodes said that they listen."""
    return list((await connection.scalars(_LISTENING)).all())


def _storable(message: str | None) -> str | None:
    """Without what Postgres' text refuses; messages may quote what a server sent."""
    return None if message is None else message.replace("\0", "").encode(errors="replace").decode()
