"""What a change makes of a scope's settings, and whether proxies could live with it."""

import asyncio
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import argon2
import msgspec

from megido_api.problems import bad_field
from megido_api.snapshots import GLOBAL, Stored
from megido_shared.config import ProxySettings
from megido_shared.config_fields import FIELDS, SECRETS, Invalid, check_together, check_value, given, merged

_hasher = argon2.PasswordHasher()


async def hashed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with secrets replaced by their argon2id hashes; "" stays: none. In a thread: a hash takes tens of
    milliseconds."""
    found = {name: value for name, value in fields.items() if name not in SECRETS}
    for name, kept in SECRETS.items():
        if name in fields:
            secret = fields[name]
            found[kept] = await asyncio.to_thread(_hasher.hash, secret) if secret else secret
    return found


def check(scope: str, fields: Mapping[str, Any]) -> None:
    """Raises Problem (400) on a value that no proxy could apply."""
    if scope != GLOBAL and fields.get("log_directory") is not None:
        raise bad_field("log_directory", "is one for all; set it in the global scope")
    for name, value in fields.items():
        if value is not None:
            try:
                check_value(name, value)
            except Invalid as error:
                raise bad_field(error.field, error.problem) from error


def check_all(changed: Stored, others: Iterable[Stored], apps: Mapping[str, str]) -> None:
    """Raises Problem (400) when settings contradict one another after the change, and did not before it: those of a
    scope over the global one, and of each application and node that may meet. `apps`: the application of each node
    that is known; any other may run under any."""
    before = {found.scope: found.settings for found in others}
    after = before | {changed.scope: changed.settings}
    for scopes in _together(after, apps):
        error = _contradiction(after, scopes)
        if error is not None and _contradiction(before, scopes) is None:
            where = " and ".join(scope for scope in scopes if scope != changed.scope)
            raise bad_field(error.field, error.problem + (f" (in {where})" if where else "")) from error


def _together(known: Collection[str], apps: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """The scopes, besides the global one, that a proxy may have at a time."""
    yield ()
    of_apps = [scope for scope in known if scope.startswith("app:")]
    for node in (scope for scope in known if scope.startswith("node:")):
        app = apps.get(node.removeprefix("node:"))
        met = of_apps if app is None else [scope for scope in of_apps if scope == f"app:{app}"]
        yield from ((scope, node) for scope in met)
        if not met or app is None:
            yield (node,)
    yield from ((scope,) for scope in of_apps)


def _contradiction(settings: Mapping[str, ProxySettings], scopes: Sequence[str]) -> Invalid | None:
    try:
        check_together(merged(settings.get(scope, ProxySettings()) for scope in (GLOBAL, *scopes)))
    except Invalid as error:
        return error
    return None


def patched(settings: ProxySettings, fields: Mapping[str, Any]) -> ProxySettings:
    """Null takes a field out."""
    return msgspec.structs.replace(settings, **fields)


def replaced(settings: ProxySettings, fields: Mapping[str, Any]) -> ProxySettings:
    """Only what is given, and the secrets that are there: nobody could send these back."""
    kept = {name: getattr(settings, name) for name in SECRETS.values()}
    return ProxySettings(**(kept | dict(fields)))


def difference(old: ProxySettings, new: ProxySettings) -> dict[str, Any]:
    """By field what was and what is, null when the scope said nothing; of a secret only that it changed."""
    before, after = given(old), given(new)
    found: dict[str, Any] = {}
    for name in FIELDS:
        kept = SECRETS.get(name, name)
        if before.get(kept) == after.get(kept):
            continue
        if name in SECRETS:
            found[name] = {"old": "set" if before.get(kept) else None, "new": "changed" if after.get(kept) else None}
        else:
            found[name] = {"old": before.get(kept), "new": after.get(kept)}
    return found


def effective(settings: ProxySettings) -> dict[str, Any]:
    """Every field as it is in force, as answers show it."""
    said = given(settings)
    found: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if name in SECRETS:
            found[f"{name}_set"] = bool(said.get(SECRETS[name]))
        else:
            found[name] = said.get(name, field.default)
    return found


def own(settings: ProxySettings) -> list[str]:
    said = given(settings)
    return [name for name in FIELDS if SECRETS.get(name, name) in said]
