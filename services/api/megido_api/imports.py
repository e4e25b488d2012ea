"""A new database under a bus that outlived the old one takes over what proxies still apply."""

from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_api.config import changes
from megido_api.rules import queries
from megido_api.snapshots import GLOBAL, raise_version, record
from megido_shared.config import PayloadRule, ProxySettings, Snapshot

BY = "imported from the bus"


async def take_over(connection: AsyncConnection, snapshot: Snapshot) -> int:
    """Stores what a scope says, above the version that proxies know, and records it; the new version. Rules are all in
    the global scope; they get new numbers."""
    version = await raise_version(connection, snapshot.scope, at_least=snapshot.version + 1, settings=snapshot.settings)
    difference = changes.difference(ProxySettings(), snapshot.settings)
    for rule in snapshot.rules if snapshot.scope == GLOBAL else ():
        values = _values(rule)
        row = await queries.create(connection, values)
        difference[f"payload_rules.{row.id}"] = {"old": None, "new": values}
    await record(connection, version, snapshot.scope, difference, BY)
    return version


def _values(rule: PayloadRule) -> dict[str, Any]:
    values = msgspec.structs.asdict(rule) | {"target_apps": list(rule.target_apps)}
    del values["id"]
    return values
