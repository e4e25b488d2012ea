"""`/interceptor/api/payload-rules/`."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Path, Query, Request, Response
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.etags import if_match
from megido_api.fields import Filter
from megido_api.problems import ErrorAnswer, Problem, bad_field, not_found
from megido_api.rules import queries
from megido_api.rules.patterns import check_injection, check_pattern
from megido_api.rules.schemas import ActiveRules, Rule, RuleInput, RulePatch
from megido_api.snapshots import GLOBAL, check_size, raise_version, record
from megido_api.state import State, StateDep
from megido_api.views import iso
from megido_api.who import who
from megido_shared.rulelimits import MAX_ACTIVE

router = APIRouter(prefix="/interceptor/api/payload-rules", tags=["payload rules"])

RuleId = Annotated[int, Path(ge=0, lt=2**63)]
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}
_CONFLICT = _NOT_FOUND | {412: {"model": ErrorAnswer, "description": "If-Match names another state than the rule's"}}
IfMatch = Annotated[
    list[str] | None, Header(alias="If-Match", description="the state that this is a change of, as ETag shows it")
]


@router.get("/", summary="List payload rules", response_model=list[Rule])
async def list_payload_rules(
    state: StateDep,
    search: Annotated[Filter, Query(description="substring of name, pattern, injection point or payload")] = None,
    ordering: Annotated[Filter, Query(description=f"names of {', '.join(queries.ORDERINGS)}, `-` reverses")] = None,
) -> Any:
    names = [name.strip() for name in (ordering or "").split(",") if name.strip()]
    for name in names:
        if name.removeprefix("-") not in queries.ORDERINGS:
            raise bad_field("ordering", f"{name!r} is none of {', '.join(queries.ORDERINGS)}")

    async def work(connection: AsyncConnection) -> list[dict[str, Any]]:
        rows = await queries.listed(connection, search, names)
        troubles = await queries.troubles(connection)
        return [_shown(row, troubles) for row in rows]

    return await state.database.read(work)


@router.get("/active/", summary="Active payload rules of an application", response_model=ActiveRules)
async def list_active_payload_rules(state: StateDep, source_app: Filter = None) -> Any:
    """Polled by proxies that have no bus."""
    rows = await state.database.read(lambda connection: queries.active(connection, source_app))
    return {"success": True, "count": len(rows), "rules": [_shown(row) for row in rows]}


@router.post("/", summary="Create a payload rule", status_code=201, response_model=Rule)
async def create_payload_rule(state: StateDep, request: Request, response: Response, rule: RuleInput) -> Any:
    values = rule.model_dump()
    _check(values)

    async def work(connection: AsyncConnection) -> tuple[None, Row[Any]]:
        return None, await queries.create(connection, values)

    return _tagged(response, await _changed(state, who(request), work))


@router.get("/{rule_id}/", summary="One payload rule", response_model=Rule, responses=_NOT_FOUND)
async def get_payload_rule(state: StateDep, response: Response, rule_id: RuleId) -> Any:

    async def work(connection: AsyncConnection) -> tuple[Row[Any], dict[int, queries.Trouble]]:
        return _found(await queries.one(connection, rule_id), rule_id), await queries.troubles(connection)

    return _tagged(response, *await state.database.read(work))


@router.put("/{rule_id}/", summary="Replace a payload rule", response_model=Rule, responses=_CONFLICT)
async def replace_payload_rule(
    state: StateDep, request: Request, response: Response, *, rule_id: RuleId, rule: RuleInput, sent: IfMatch = None
) -> Any:
    return _tagged(response, await _update(state, who(request), rule_id, rule.model_dump(), sent))


@router.patch("/{rule_id}/", summary="Change fields of a payload rule", response_model=Rule, responses=_CONFLICT)
async def change_payload_rule(
    state: StateDep, request: Request, response: Response, *, rule_id: RuleId, patch: RulePatch, sent: IfMatch = None
) -> Any:
    values = patch.model_dump(exclude_unset=True)
    for name, value in values.items():
        if value is None:
            raise bad_field(name, "must not be null")
    return _tagged(response, await _update(state, who(request), rule_id, values, sent))


@router.delete("/{rule_id}/", summary="Delete a payload rule", status_code=204, responses=_CONFLICT)
async def delete_payload_rule(state: StateDep, request: Request, rule_id: RuleId, sent: IfMatch = None) -> Response:
    async def work(connection: AsyncConnection) -> tuple[Row[Any], None]:
        old = await _locked(connection, rule_id, sent)
        await queries.remove(connection, rule_id)
        return old, None

    await _changed(state, who(request), work)
    return Response(status_code=204)


async def _update(
    state: State, by: str, rule_id: int, values: dict[str, Any], if_match_sent: Sequence[str] | None
) -> Row[Any]:
    """What a rule becomes is checked as a whole: a patch of one field may not fit the others."""

    async def work(connection: AsyncConnection) -> tuple[Row[Any], Row[Any]]:
        old = await _locked(connection, rule_id, if_match_sent)
        _check({name: getattr(old, name) for name in RuleInput.model_fields} | values)
        return old, _found(await queries.change(connection, rule_id, values), rule_id)

    return await _changed(state, by, work)


async def _locked(connection: AsyncConnection, rule_id: int, sent: Sequence[str] | None) -> Row[Any]:
    """The rule as it is until the transaction's end. Raises Problem: 404, and 412 when it is not what `If-Match`
    names: somebody else was quicker."""
    row = _found(await queries.one(connection, rule_id, lock=True), rule_id)
    if sent is not None and not if_match(sent, _tag(row)):
        raise Problem(412, "conflict", f"payload rule {rule_id} was changed meanwhile: read it again", etag=_tag(row))
    return row


async def _changed[T: Row[Any] | None](
    state: State, by: str, work: Callable[[AsyncConnection], Awaitable[tuple[Row[Any] | None, T]]]
) -> T:
    """Commits a change (what was, what is) under a new version, then lets running proxies know."""

    async def versioned(connection: AsyncConnection) -> T:
        old, new = await work(connection)
        version = await raise_version(connection, GLOBAL)
        await record(connection, version, GLOBAL, _difference(old, new), by)
        if new is not None and new.active:  # what makes it smaller is never refused
            if await queries.active_count(connection) > MAX_ACTIVE:
                raise Problem(400, "too_many_rules", f"there are more than {MAX_ACTIVE} active rules")
            await check_size(connection, GLOBAL)
        return new

    result = await state.database.write(versioned)
    state.config_changed()
    return result


def _difference(old: Row[Any] | None, new: Row[Any] | None) -> dict[str, Any]:
    """For the audit."""
    known = old if old is not None else new
    assert known is not None
    return {f"payload_rules.{known.id}": {"old": _audited(old), "new": _audited(new)}}


def _audited(row: Row[Any] | None) -> dict[str, Any] | None:
    return None if row is None else {name: getattr(row, name) for name in RuleInput.model_fields}


def _check(values: dict[str, Any]) -> None:
    check_pattern("target_url_pattern", values["target_url_pattern"])
    check_injection(values["injection_type"], values["injection_point"], values["payload_content"])


def _found(row: Row[Any] | None, rule_id: int) -> Row[Any]:
    if row is None:
        raise not_found("payload rule", rule_id)
    return row


def _tag(row: Row[Any]) -> str:
    """Of what people say about a rule; its hits and failures are no change."""
    said = [row.id, row.updated_at.isoformat(), *(getattr(row, name) for name in RuleInput.model_fields)]
    return f'"{hashlib.sha256(msgspec.json.encode(said)).hexdigest()[:32]}"'


def _tagged(
    response: Response, row: Row[Any], troubles: Mapping[int, queries.Trouble] = MappingProxyType({})
) -> dict[str, Any]:
    response.headers["ETag"] = _tag(row)
    return _shown(row, troubles)


def _shown(row: Row[Any], troubles: Mapping[int, queries.Trouble] = MappingProxyType({})) -> dict[str, Any]:
    trouble = troubles.get(row.id, queries.Trouble())
    return {
        "id": row.id,
        "name": row.name,
        "target_url_pattern": row.target_url_pattern,
        "injection_type": row.injection_type,
        "injection_point": row.injection_point,
        "payload_content": row.payload_content,
        "active": row.active,
        "target_apps": list(row.target_apps),
        "created_by": None,  # a user's number; there are no users yet
        "created_by_username": row.created_by or None,
        "created_at": iso(row.created_at),
        "updated_at": iso(row.updated_at),
        "hits": row.hits,
        "last_hit_at": None if row.last_hit_at is None else iso(row.last_hit_at),
        "errors": trouble.errors,
        "skipped": trouble.skipped,
        "etag": _tag(row),
    }
