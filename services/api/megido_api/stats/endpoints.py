"""`/proxy/api/stats/`."""

import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from megido_api.fields import Bound
from megido_api.parameters import ONLY_KNOWN
from megido_api.state import StateDep
from megido_api.stats import collecting, summary
from megido_api.stats.schemas import Stats
from megido_shared import ids
from megido_shared.clock import utc

router = APIRouter(prefix="/proxy/api", tags=["statistics"])


@router.get("/stats/", summary="Statistics, of everything or of a range", response_model=Stats, dependencies=ONLY_KNOWN)
async def get_stats(
    state: StateDep,
    from_: Annotated[Bound, Query(alias="from")] = None,
    to: Bound = None,
    bucket: Annotated[Literal["minute", "hour", "day"] | None, Query(description="makes `series`")] = None,
) -> Any:
    """Counted as flows are stored, so what retention removes stays counted. A range is in whole minutes, of more than
    three days ago in whole hours, of more than 400 days ago in whole days; `since` and `until` say which, and `bucket`
    likewise. Without `from` they begin a day before the oldest day that is kept, whatever time something was posted
    with, and `series` has the newest 1,500 buckets."""
    now = utc(state.clock.time_us())
    wanted = collecting.Wanted(_moment(from_), _moment(to), bucket)
    found = await state.database.read(lambda connection: collecting.collect(connection, wanted, now))
    return summary.answer(found, bucket, now)


def _moment(bound: uuid.UUID | datetime | None) -> datetime | None:
    """A flow's id stands for the time that it carries."""
    return utc(ids.time_ms(bound.bytes) * 1000) if isinstance(bound, uuid.UUID) else bound
