"""`/proxy/api/dead-letters/`."""

import base64
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.deadletters import queries
from megido_api.deadletters.schemas import (
    DeadLetter,
    DeadLetterDetail,
    DeadLetterList,
    LetterState,
    RedriveInput,
    Redriven,
)
from megido_api.deadletters.view import decoded
from megido_api.fields import Filter, Limit
from megido_api.paging import Page, Total
from megido_api.parameters import ONLY_KNOWN
from megido_api.problems import ErrorAnswer, Problem, not_found
from megido_api.state import StateDep
from megido_api.views import iso
from megido_api.who import who

router = APIRouter(prefix="/proxy/api/dead-letters", tags=["dead letters"])

LetterId = Annotated[int, Path(ge=0, lt=2**63)]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}
_STORED: dict[int | str, dict[str, Any]] = {409: {"model": ErrorAnswer, "description": "It is stored by now"}}
_LARGE: dict[int | str, dict[str, Any]] = {413: {"model": ErrorAnswer, "description": "No bus would take it"}}


@router.get(
    "/", summary="Records that could not be stored, newest first", response_model=DeadLetterList,
    dependencies=ONLY_KNOWN,
)  # fmt: skip
async def list_dead_letters(
    *,
    state: StateDep,
    topic: Filter = None,
    reason: Annotated[Filter, Query(description="substring")] = None,
    letter_state: Annotated[LetterState | None, Query(alias="state")] = None,
    limit: Limit = 50,
    cursor: Annotated[int | None, Query(ge=0, lt=2**63, description="`next_cursor` of the page before")] = None,
) -> Any:
    filters = queries.Filters(topic, reason, letter_state)

    async def work(connection: AsyncConnection) -> tuple[Page, Total]:
        page = await queries.page(connection, filters, cursor=cursor, limit=limit)
        if cursor is None and not page.more:
            return page, Total(len(page.rows), exact=True)
        return page, await queries.total(connection, filters)

    page, total = await state.database.read(work)
    return {
        "dead_letters": [_listed(row) for row in page.rows],
        "total": total.count,
        "limit": limit,
        "total_is_exact": total.exact,
        "next_cursor": page.rows[-1].id if page.more else None,
    }


@router.post("/redrive/", summary="Put many through ingest again", status_code=202, response_model=Redriven)
async def redrive_dead_letters(state: StateDep, request: Request, wanted: RedriveInput) -> Any:
    """Each goes through the bus once more, and is stored once, or is a dead letter again with one attempt more."""
    filters = queries.Filters(wanted.topic, wanted.reason, wanted.state, wanted.after)
    done = await state.publish(lambda connection: queries.queue(connection, filters, who(request)))
    return done._asdict()


@router.get("/{letter_id}/", summary="One with its bytes", response_model=DeadLetterDetail, responses=_NOT_FOUND)
async def get_dead_letter(state: StateDep, letter_id: LetterId) -> Any:
    row = _found(await state.database.read(lambda connection: queries.one(connection, letter_id)), letter_id)
    return _listed(row) | {
        "key_base64": base64.b64encode(row.key).decode(),
        "value_base64": base64.b64encode(row.value).decode(),
        "decoded": decoded(row.value),
    }


@router.post(
    "/{letter_id}/redrive/", summary="Put it through ingest again", status_code=202, response_model=DeadLetter,
    responses=_NOT_FOUND | _STORED | _LARGE,
)  # fmt: skip
async def redrive_dead_letter(state: StateDep, request: Request, letter_id: LetterId) -> Any:
    """State `queued`; `redriven` once it is stored. Also for one that is queued and whose record never came."""

    async def work(connection: AsyncConnection) -> Row[Any]:
        row = await _open(connection, letter_id)
        if not queries.fits(row):
            raise Problem(413, "too_large", f"dead letter {letter_id} has {row.size} bytes; no bus takes so many")
        await queries.queue_these(connection, [letter_id], who(request))
        return _found(await queries.one(connection, letter_id, lock=True), letter_id)

    return _listed(await state.publish(work))


@router.delete("/{letter_id}/", summary="Discard it", status_code=204, responses=_NOT_FOUND | _STORED)
async def discard_dead_letter(state: StateDep, request: Request, letter_id: LetterId) -> Response:
    """Its record stays, marked with who discarded it and when; it counts as a dead letter still."""

    async def work(connection: AsyncConnection) -> None:
        await _open(connection, letter_id)
        await queries.discard(connection, letter_id, who(request))

    await state.database.write(work)
    return Response(status_code=204)


async def _open(connection: AsyncConnection, letter_id: int) -> Row[Any]:
    """The row, locked; Problem when there is nothing left to do about it."""
    row = _found(await queries.one(connection, letter_id, lock=True), letter_id)
    if row.state == "redriven":
        raise Problem(409, "already_stored", f"dead letter {letter_id} has been redriven, its record is stored")
    return row


def _found(row: Row[Any] | None, letter_id: int) -> Row[Any]:
    if row is None:
        raise not_found("dead letter", letter_id)
    return row


def _listed(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "topic": row.topic,
        "partition": row.partition,
        "offset": row.offset,
        "source_id": row.source_id,
        "event_type": row.event_type,
        "reason": row.reason,
        "size": row.size,
        "state": row.state,
        "attempts": row.attempts,
        "created_at": iso(row.created_at),
        "changed_by": row.changed_by or None,
        "changed_at": None if row.changed_at is None else iso(row.changed_at),
    }
