"""`megido config`, `nodes` and `rules`: what running proxies are told, and what they make of it, over the REST API."""

import getpass
import json
import sys
from collections.abc import Sequence
from typing import Any

from megido.client import Client
from megido.terminal import note, safe_line, table, write
from megido_shared.config_fields import FIELDS, SECRETS
from megido_shared.errors import ConfigurationError

_FLAGS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def show(client: Client, scope: str, *, as_json: bool) -> int:
    """The fields in force, where each comes from, and which running nodes override it."""
    found = client.config(scope)
    if as_json:
        write(json.dumps(found, ensure_ascii=False))
        return 0
    own, overridden = set(found["own"]), found["overridden"]
    rows = [
        [name, _value(found, name), scope if name in own else "", _overriding(overridden.get(name, ()))]
        for name in found["fields"]
    ]
    write(table(("FIELD", "VALUE", "SET BY", "OVERRIDDEN BY"), rows))
    note(f"{scope} is at version {found['version']}; scopes: {', '.join(found['scopes'])}")
    return 0


def _value(found: dict[str, Any], name: str) -> str:
    if name in SECRETS:
        return "(set)" if found[f"{name}_set"] else "(none)"
    return _text(found[name])


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _overriding(overrides: Sequence[dict[str, str]]) -> str:
    return ", ".join(f"{one['node']}={one['value']}" for one in overrides)


def change(client: Client, scope: str, assignments: Sequence[str], *, as_json: bool) -> int:
    """`NAME=VALUE`, or the `NAME` of a secret, which is asked for. Raises ConfigurationError on what is neither."""
    return _patch(client, scope, dict(_assigned(text) for text in assignments), as_json)


def unset(client: Client, scope: str, names: Sequence[str], *, as_json: bool) -> int:
    """The scope says nothing about them any more. Raises ConfigurationError on an unknown name."""
    return _patch(client, scope, {_known(name): None for name in names}, as_json)


def _patch(client: Client, scope: str, fields: dict[str, Any], as_json: bool) -> int:
    found = client.change_config(scope, fields)
    if as_json:
        write(json.dumps(found, ensure_ascii=False))
        return 0
    for name in fields:
        write(f"{name} = {safe_line(_value(found, name))}")
        if overrides := found["overridden"].get(name):
            note(f"decided at the start of {safe_line(_overriding(overrides))}: not changed there")
    note(f"{scope} is at version {found['version']}; see who applies it: megido nodes")
    return 0


def _assigned(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    name = _known(name.strip())
    if not given and name not in SECRETS:
        raise ConfigurationError(f"{name} has no value; write {name}=VALUE, or: megido config unset {name}")
    if not given:
        value = getpass.getpass(f"{name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    match FIELDS[name].kind:
        case "flag":
            if value.lower() not in _FLAGS:
                raise ConfigurationError(f"{name} is {value!r}; it must be on or off")
            return name, _FLAGS[value.lower()]
        case "number":
            try:
                return name, int(value)
            except ValueError:
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number") from None
        case _:
            return name, value


def _known(name: str) -> str:
    if name not in FIELDS:
        raise ConfigurationError(f"{safe_line(name)!r} is no field of the configuration; see: megido config show")
    return name


def history(client: Client, scope: str, *, limit: int, as_json: bool) -> int:
    """Changes of settings and payload rules, newest first."""
    found = client.config_history(scope=scope, limit=limit)["changes"]
    if as_json:
        for one in found:
            write(json.dumps(one, ensure_ascii=False))
        return 0
    rows = [
        [str(one["version"]), one["changed_at"][:19].replace("T", " "), one["changed_by"], one["scope"], _changes(one)]
        for one in found
    ]
    write(table(("VERSION", "TIME (UTC)", "BY", "SCOPE", "CHANGE"), rows, right=frozenset({0})))
    return 0


def _changes(change: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {_side(pair['old'])} → {_side(pair['new'])}" for name, pair in change["changes"].items())


def _side(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name"))
    return "–" if value is None else _text(value)


def nodes(client: Client, *, every: bool, as_json: bool) -> int:
    """The running nodes, or all that were heard of: what each applies, and what keeps it from more."""
    found = client.nodes(alive=None if every else True)["nodes"]
    if as_json:
        for node in found:
            write(json.dumps(node, ensure_ascii=False))
        return 0
    if not found:
        note("no node is running; start one: megido capture" if not every else "no node was ever heard of")
        return 0
    rows = [
        [
            node["node"],
            node["service"],
            node["state"] if node["alive"] or node["state"] == "stopping" else "silent",
            node["listen"],
            node["source_app"],
            _applied(node),
            str(node["captured"]),
            str(node["counters"].get("dropped", 0)),
            node["seen_at"][:19].replace("T", " "),
            ", ".join(f"{name}={value}" for name, value in node["pinned"].items()),
        ]
        for node in found
    ]
    headings = (
        *("NODE", "SERVICE", "STATE", "LISTENS ON", "APPLICATION", "CONFIG", "CAPTURED", "DROPPED"),
        *("LAST HEARD (UTC)", "DECIDED AT ITS START"),
    )
    write(table(headings, rows, right=frozenset({6, 7})))
    for node in found:
        if node["config_error"]:
            note(f"{safe_line(node['node'])}: {safe_line(node['config_error'])}")
    return 0


def _applied(node: dict[str, Any]) -> str:
    if node["config_expected"] is None:
        return "–"
    late = "" if node["config_version"] >= node["config_expected"] else f" of {node['config_expected']}"
    return f"{node['config_version']}{late}{' stale' if node['config_stale'] else ''}"


def rules(client: Client, *, as_json: bool) -> int:
    """The payload rules and how often each was applied, failed, or met a body too large for it."""
    found = client.rules()
    if as_json:
        for rule in found:
            write(json.dumps(rule, ensure_ascii=False))
        return 0
    rows = [
        [
            str(rule["id"]),
            "on" if rule["active"] else "off",
            *(str(rule[name]) for name in ("hits", "errors", "skipped")),
            f"{rule['injection_type']} {rule['injection_point']}",
            ",".join(rule["target_apps"]) or "all",
            rule["name"],
            rule["target_url_pattern"],
        ]
        for rule in found
    ]
    headings = ("ID", "STATE", "HITS", "ERRORS", "SKIPPED", "WHERE", "APPLICATIONS", "NAME", "PATTERN")
    write(table(headings, rows, right=frozenset({0, 2, 3, 4})))
    return 0
