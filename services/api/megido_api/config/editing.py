"""Readers and writers of the configuration: a change in one transaction, the answer that shows what is in force."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.config import changes, queries
from megido_api.config.schemas import help_of_fields
from megido_api.etags import if_match
from megido_api.problems import Problem
from megido_api.snapshots import (
    GLOBAL,
    Stored,
    all_stored,
    check_size,
    lock_changes,
    raise_version,
    record,
    stored,
)
from megido_api.state import State, StateDep
from megido_api.views import iso
from megido_api.who import who
from megido_shared.config import ProxySettings
from megido_shared.config_fields import FIELDS, given, merged

type Make = Callable[[ProxySettings], ProxySettings]
"""From what a scope said to what it says."""

type Merge = Callable[[ProxySettings, dict[str, Any]], ProxySettings]


class Editor:
    """`if_match` is the version, as ETag shows it, that a change is made of."""

    def __init__(self, state: State, by: str, response: Response, if_match: Sequence[str] | None) -> None:
        self._state = state
        self._by = by
        self._response = response
        self._if_match = if_match

    async def apply(self, scope: str, sent: BaseModel, merge: Merge) -> dict[str, Any]:
        """Raises Problem: 400 on what no proxy could apply, 409 and 412 when somebody else was quicker."""
        document = sent.model_dump(exclude_unset=True)
        fields = {name: document[name] for name in FIELDS if name in document}
        changes.check(scope, fields)
        values = await changes.hashed(fields)
        await self.change(scope, lambda settings: merge(settings, values), document.get("version"))
        return await self.answer(scope)

    async def change(self, scope: str, make: Make, expected: int | None = None) -> None:
        """Under the lock that puts changes in order; then running proxies hear of it. Nothing that changes nothing
        becomes a version."""

        async def work(connection: AsyncConnection) -> bool:
            await lock_changes(connection)
            before = await stored(connection, scope)
            self._check_version(before, expected)
            settings = make(before.settings)
            difference = changes.difference(before.settings, settings)
            if difference:
                apps = await queries.apps_of_nodes(connection)
                changes.check_all(Stored(scope=scope, settings=settings), await all_stored(connection), apps)
                version = await raise_version(connection, scope, settings=settings)
                await record(connection, version, scope, difference, self._by)
                await check_size(connection, scope)
            return bool(difference)

        if await self._state.database.write(work):
            self._state.config_changed()

    def _check_version(self, current: Stored, expected: int | None) -> None:
        text = f"{current.scope} is at version {current.version}: read it again"
        if expected is not None and expected != current.version:
            raise Problem(409, "conflict", text, version=current.version)
        if self._if_match is not None and not if_match(self._if_match, f'"{current.version}"'):
            raise Problem(412, "conflict", text, version=current.version)

    async def answer(self, scope: str) -> dict[str, Any]:
        async def work(connection: AsyncConnection) -> tuple[list[Stored], dict[str, list[dict[str, str]]]]:
            return await all_stored(connection), await queries.overridden(connection)

        found, overridden = await self._state.database.read(work)
        by_scope = {one.scope: one for one in found}
        this = by_scope.get(scope, Stored(scope=scope))
        below = by_scope.get(GLOBAL, Stored(scope=GLOBAL))
        self._response.headers["ETag"] = f'"{this.version}"'
        return {
            "scope": scope,
            "version": this.version,
            "updated_at": None if this.updated_at is None else iso(this.updated_at),
            **changes.effective(merged([below.settings, this.settings])),
            "own": changes.own(this.settings),
            "scopes": [one.scope for one in found if one.scope == GLOBAL or given(one.settings)],
            "overridden": overridden,
            "fields": help_of_fields(),
        }


def _editor(
    state: StateDep,
    request: Request,
    response: Response,
    sent: Annotated[
        list[str] | None, Header(alias="If-Match", description='the version as ETag shows it: `"7"`')
    ] = None,
) -> Editor:
    return Editor(state, who(request), response, sent)


EditorDep = Annotated[Editor, Depends(_editor)]
