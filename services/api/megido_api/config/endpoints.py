"""`/proxy/api/config/`."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Header, Path, Query, Response
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.access import require_token
from megido_api.config import changes, queries
from megido_api.config.editing import EditorDep
from megido_api.config.schemas import (
    ActiveSnapshots,
    Configuration,
    ConfigurationInput,
    History,
    PassthroughHost,
)
from megido_api.etags import if_none_match
from megido_api.fields import Filter
from megido_api.parameters import ONLY_KNOWN
from megido_api.problems import ErrorAnswer, Problem, not_found
from megido_api.snapshots import GLOBAL, snapshots
from megido_api.state import StateDep
from megido_api.views import iso
from megido_shared.config import ProxySettings, Snapshot
from megido_shared.config_fields import given
from megido_shared.networks import entries

router = APIRouter(prefix="/proxy/api/config", tags=["configuration"])

_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorAnswer, "description": "Somebody else changed it meanwhile"},
    412: {"model": ErrorAnswer, "description": "If-Match names another version than the current one"},
}
ScopeName = Annotated[str, Path(pattern=r"^(global|(app|node):[^\x00-\x1f\x7f]{1,200})$")]


@router.get("/", summary="The configuration of all proxies", response_model=Configuration)
async def get_configuration(editor: EditorDep) -> Any:
    """Every field as it is in force, its meaning, and which running nodes override it."""
    return await editor.answer(GLOBAL)


@router.patch("/", summary="Change fields", response_model=Configuration, responses=_CONFLICT)
async def change_configuration(
    editor: EditorDep,
    sent: ConfigurationInput,  # type: ignore[valid-type]
) -> Any:
    """Every running proxy applies it within two seconds. Secrets are stored as argon2id hashes; "" removes one."""
    return await editor.apply(GLOBAL, sent, changes.patched)


@router.put("/", summary="Replace all fields", response_model=Configuration, responses=_CONFLICT)
async def replace_configuration(
    editor: EditorDep,
    sent: ConfigurationInput,  # type: ignore[valid-type]
) -> Any:
    """Fields that are left out return to their defaults; secrets that are left out stay."""
    return await editor.apply(GLOBAL, sent, changes.replaced)


@router.get("/history/", summary="Who changed what, when", response_model=History, dependencies=ONLY_KNOWN)
async def get_configuration_history(
    state: StateDep,
    scope: Filter = None,
    before: Annotated[int | None, Query(ge=0, lt=2**63, description="older than this version")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Any:
    """Settings and payload rules alike."""
    rows, total = await state.database.read(lambda connection: queries.history(connection, scope, before, limit))
    return {
        "total": total,
        "changes": [
            {
                "version": row.version,
                "scope": row.scope,
                "changed_by": row.changed_by,
                "changed_at": iso(row.changed_at),
                "changes": row.changes,
            }
            for row in rows
        ],
    }


@router.get(
    "/active/",
    summary="What one proxy has to apply",
    response_model=ActiveSnapshots,
    dependencies=[Depends(require_token), *ONLY_KNOWN],
    responses={304: {"description": "Nothing has changed since the tag of If-None-Match"}},
)
async def get_active_configuration(
    state: StateDep,
    source_app: Filter = None,
    node: Filter = None,
    known: Annotated[list[str] | None, Header(alias="If-None-Match", description="ETag of the answer before")] = None,
) -> Response:
    """Polled by proxies that have no bus, every two seconds. Holds hashes of credentials, so it asks for the token
    wherever one is set."""
    scopes = [GLOBAL] + ([f"app:{source_app}"] if source_app else []) + ([f"node:{node}"] if node else [])

    async def work(connection: AsyncConnection) -> tuple[str, list[Snapshot] | None]:
        # First: of a change in between the tag is the older one, and the next poll gets it again.
        tag = await queries.tag(connection, scopes)
        return tag, None if if_none_match(known or (), tag) else await snapshots(connection, scopes)

    tag, found = await state.database.read(work)
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if found is None:
        return Response(status_code=304, headers=headers)
    return Response(msgspec.json.encode({"snapshots": found}), media_type="application/json", headers=headers)


@router.post("/passthrough/", summary="Tunnel a host untouched", response_model=Configuration)
async def add_passthrough_host(editor: EditorDep, added: PassthroughHost) -> Any:
    """For a host whose clients pin its certificate: its TLS is no longer opened."""
    host = added.host.lower()
    changes.check(GLOBAL, {"passthrough_hosts": host})

    def make(settings: ProxySettings) -> ProxySettings:
        known = entries(settings.passthrough_hosts or "")
        hosts = known if host in known else [*known, host]
        return changes.patched(settings, {"passthrough_hosts": ", ".join(hosts)})

    await editor.change(GLOBAL, make)
    return await editor.answer(GLOBAL)


@router.delete(
    "/passthrough/",
    summary="Open a host's TLS again",
    response_model=Configuration,
    responses={404: {"model": ErrorAnswer}},
)
async def remove_passthrough_host(editor: EditorDep, host: Annotated[str, Query(max_length=255)]) -> Any:
    wanted = host.strip().lower()

    def make(settings: ProxySettings) -> ProxySettings:
        known = entries(settings.passthrough_hosts or "")
        if wanted not in known:
            raise Problem(404, "not_found", f"{wanted} is not among the passthrough hosts")
        return changes.patched(settings, {"passthrough_hosts": ", ".join(item for item in known if item != wanted)})

    await editor.change(GLOBAL, make)
    return await editor.answer(GLOBAL)


@router.get("/{scope}/", summary="The configuration of an application or a node", response_model=Configuration)
async def get_scoped_configuration(editor: EditorDep, scope: ScopeName) -> Any:
    """What it says itself over what the global one says."""
    return await editor.answer(scope)


@router.patch("/{scope}/", summary="Change fields of a scope", response_model=Configuration, responses=_CONFLICT)
async def change_scoped_configuration(
    editor: EditorDep,
    scope: ScopeName,
    sent: ConfigurationInput,  # type: ignore[valid-type]
) -> Any:
    return await editor.apply(scope, sent, changes.patched)


@router.put("/{scope}/", summary="Replace all fields of a scope", response_model=Configuration, responses=_CONFLICT)
async def replace_scoped_configuration(
    editor: EditorDep,
    scope: ScopeName,
    sent: ConfigurationInput,  # type: ignore[valid-type]
) -> Any:
    return await editor.apply(scope, sent, changes.replaced)


@router.delete(
    "/{scope}/", summary="Leave a scope to the global one", status_code=204, responses={404: {"model": ErrorAnswer}}
)
async def delete_scoped_configuration(editor: EditorDep, scope: ScopeName) -> Response:
    def make(settings: ProxySettings) -> ProxySettings:
        if not given(settings):
            raise not_found("configuration", scope)
        return ProxySettings()

    await editor.change(scope, make)
    return Response(status_code=204)
