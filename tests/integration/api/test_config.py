"""The configuration: read, changed field by field, refused when no proxy could apply it, audited, published."""

import asyncio
from functools import partial
from typing import Any

import argon2
import msgspec
import pytest

from megido_api.settings import Settings
from megido_shared.bus.local import LocalBus
from megido_shared.config import PayloadRule, ProxySettings, Snapshot, decode_snapshot, encode_snapshot
from megido_shared.config_fields import FIELDS, SECRETS
from tests.integration.api.harness import Api, Ingest, eventually, running
from tests.integration.api.test_nodes import a_status, nodes

PATH = "/proxy/api/config/"
FOUNDING = {
    "auth_enabled": False,
    "auth_username": "",
    "ip_whitelist": "",
    "ip_blacklist": "",
    "logging_enabled": True,
    "log_request_body": True,
    "log_response_body": True,
    "log_directory": "logs/proxy",
    "connection_timeout": 30,
    "transfer_timeout": 0,
    "max_concurrent_clients": 2000,
    "cache_enabled": False,
    "websocket_enabled": True,
}
PASSWORD, TOKEN = "correct horse battery", "f00d-" * 8


async def published(api: Api, scope: str = "global", at_least: int = 1) -> Snapshot:
    """The snapshot that proxies get, once its version is that high."""

    async def current() -> Snapshot | None:
        raw = await api.bus.get_config(scope)
        found = None if raw is None else decode_snapshot(raw)
        return found if found is not None and found.version >= at_least else None

    found = await eventually(current, f"version {at_least} of {scope}")
    assert found is not None
    return found


def problem(answer: dict[str, Any]) -> tuple[str, str]:
    [entry] = answer["error"]["details"]["fields"]
    return entry["field"], entry["problem"]


async def test_every_field_with_its_default_and_help(api: Api) -> None:
    found = await api.get(PATH)
    assert {name: found[name] for name in FOUNDING} == FOUNDING
    assert (found["scope"], found["own"], found["overridden"]) == ("global", [], {})
    assert (found["auth_password_set"], found["auth_token_set"]) == (False, False)
    assert set(found["fields"]) == set(FIELDS)
    for name, field in FIELDS.items():
        assert found["fields"][name]["help"] and found["fields"][name]["default"] == field.default
        assert name in SECRETS or found[name] == field.default
    assert (found["fields"]["connection_timeout"]["minimum"], found["fields"]["max_body_size"]["type"]) == (1, "number")


async def test_a_change_is_in_force_published_and_audited(api: Api) -> None:
    first = await published(api)
    changed = await api.send("PATCH", PATH, {"logging_enabled": False, "ip_blacklist": "10.0.0.0/8, 2001:db8::1"})
    assert (changed["logging_enabled"], changed["ip_blacklist"]) == (False, "10.0.0.0/8, 2001:db8::1")
    assert changed["own"] == ["ip_blacklist", "logging_enabled"] and changed["version"] == first.version + 1
    snapshot = await published(api, at_least=changed["version"])
    assert (snapshot.settings.logging_enabled, snapshot.settings.ip_blacklist) == (False, "10.0.0.0/8, 2001:db8::1")
    assert snapshot.settings.log_request_body is None

    same = await api.send("PATCH", PATH, {"logging_enabled": False})
    assert same["version"] == changed["version"]
    back = await api.send("PATCH", PATH, {"logging_enabled": None, "connection_timeout": 5})
    assert (back["logging_enabled"], back["connection_timeout"]) == (True, 5)
    assert back["own"] == ["ip_blacklist", "connection_timeout"]

    found = await api.get(f"{PATH}history/")
    assert found["total"] == 2
    newest, oldest = found["changes"]
    assert (newest["version"], newest["scope"], newest["changed_by"]) == (back["version"], "global", "127.0.0.1")
    assert newest["changes"] == {
        "logging_enabled": {"old": False, "new": None},
        "connection_timeout": {"old": None, "new": 5},
    }
    assert oldest["changes"]["ip_blacklist"] == {"old": None, "new": "10.0.0.0/8, 2001:db8::1"}
    assert (await api.get(f"{PATH}history/", before=newest["version"]))["changes"] == [oldest]
    assert (await api.get(f"{PATH}history/", scope="app:x"))["changes"] == []


async def test_put_replaces_all_but_secrets(api: Api) -> None:
    await api.send("PATCH", PATH, {"max_body_size": 10, "auth_password": PASSWORD})
    found = await api.send("PUT", PATH, {"cache_enabled": True})
    assert (found["max_body_size"], found["cache_enabled"], found["auth_password_set"]) == (1048576, True, True)
    assert found["own"] == ["auth_password", "cache_enabled"]


async def test_secrets_are_hashed_never_shown_and_removed_by_an_empty_one(api: Api, settings: Settings) -> None:
    changed = await api.send(
        "PATCH", PATH, {"auth_enabled": True, "auth_username": "ann", "auth_password": PASSWORD, "auth_token": TOKEN}
    )
    assert (changed["auth_password_set"], changed["auth_token_set"]) == (True, True)
    snapshot = await published(api, at_least=changed["version"])
    hasher = argon2.PasswordHasher()
    for secret, kept in (
        (PASSWORD, snapshot.settings.auth_password_hash),
        (TOKEN, snapshot.settings.auth_token_hash),
    ):
        assert kept is not None and kept.startswith("$argon2id$") and hasher.verify(kept, secret)
    history = await api.get(f"{PATH}history/")
    assert history["changes"][0]["changes"]["auth_password"] == {"old": None, "new": "changed"}
    for shown in (changed, await api.get(PATH), history, await api.get(f"{PATH}active/")):
        assert PASSWORD not in str(shown) and TOKEN not in str(shown)
    assert "argon2" not in str((changed, history))
    files = [path for path in settings.common.data_dir.root.rglob("*") if path.is_file()]
    assert files and not [path for path in files if PASSWORD.encode() in path.read_bytes()]

    kept_token = await api.send("PATCH", PATH, {"auth_password": ""})
    assert (kept_token["auth_password_set"], kept_token["auth_token_set"]) == (False, True)
    refused = await api.send("PATCH", PATH, {"auth_token": ""}, status=400)
    assert problem(refused)[0] == "auth_enabled"
    assert (await api.get(PATH))["auth_token_set"] is True


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"ip_whitelist": "10.0.0.0/8, 10.0.0.300"}, "ip_whitelist", "'10.0.0.300'"),
        ({"ip_blacklist": "fe80::/200"}, "ip_blacklist", "'fe80::/200'"),
        ({"ip_blacklist": "10.0.0.1/8"}, "ip_blacklist", "'10.0.0.1/8'"),
        ({"connection_timeout": 0}, "connection_timeout", "between 1 and 86400"),
        ({"connection_timeout": "30"}, "connection_timeout", ""),
        ({"connection_timeout": True}, "connection_timeout", ""),
        ({"max_body_size": -1}, "max_body_size", "between"),
        ({"max_body_size": 1 << 63}, "max_body_size", ""),
        ({"logging_enabled": "yes"}, "logging_enabled", ""),
        ({"auth_username": "a\r\nb"}, "auth_username", "control"),
        ({"auth_username": "a:b"}, "auth_username", "RFC 7617"),
        ({"auth_token": "x" * 1025}, "auth_token", "1024"),
        ({"auth_enabled": True}, "auth_enabled", "auth_password or auth_token"),
        ({"log_directory": "../x"}, "log_directory", "'..'"),
        ({"log_directory": "/var/log/x"}, "log_directory", "not an absolute path"),
        ({"auth_username": "\ud800"}, "auth_username", "surrogate"),
        ({"auth_password": "\udc00x"}, "auth_password", "surrogate"),
        ({"passthrough_hosts": "a b"}, "passthrough_hosts", "'a b'"),
        ({"auth_password_hash": "x"}, "auth_password_hash", "not known"),
        ({"nonsense": 1}, "nonsense", "not known"),
    ],
)
async def test_what_no_proxy_could_apply_is_refused_with_its_field(
    api: Api, change: dict[str, Any], field: str, says: str
) -> None:
    await published(api)
    before = await api.get(PATH)
    for method in ("PATCH", "PUT"):
        found = await api.send(method, PATH, {"cache_enabled": True} | change, status=400)
        assert problem(found)[0] == field
        assert says in problem(found)[1]
    assert await api.get(PATH) == before


async def test_scopes_over_the_global_one(api: Api) -> None:
    await api.send("PATCH", PATH, {"max_body_size": 100, "connection_timeout": 7})
    scoped = await api.send("PATCH", f"{PATH}app:scanner/", {"max_body_size": 200})
    assert (scoped["scope"], scoped["max_body_size"], scoped["connection_timeout"]) == ("app:scanner", 200, 7)
    assert scoped["own"] == ["max_body_size"] and scoped["scopes"] == ["app:scanner", "global"]
    node = await api.send("PATCH", f"{PATH}node:capture-0/", {"max_body_size": 300})
    assert node["version"] == scoped["version"] + 1
    snapshot = await published(api, "app:scanner")
    assert (snapshot.version, snapshot.settings.max_body_size, snapshot.rules) == (scoped["version"], 200, ())

    active = await api.get(f"{PATH}active/", source_app="scanner", node="capture-0")
    assert [one["scope"] for one in active["snapshots"]] == ["app:scanner", "global", "node:capture-0"]
    assert (await api.get(f"{PATH}active/", source_app="other"))["snapshots"][0]["scope"] == "global"

    await api.send("DELETE", f"{PATH}app:scanner/", status=204)
    left = await published(api, "app:scanner", scoped["version"] + 1)  # proxies must hear of it
    assert left.settings.max_body_size is None
    assert (await api.get(f"{PATH}app:scanner/"))["max_body_size"] == 100
    await api.send("DELETE", f"{PATH}app:scanner/", status=404)
    assert problem(await api.send("PATCH", f"{PATH}app:x/", {"log_directory": "x"}, status=400))[0] == "log_directory"
    for bad in ("app:", "nothing", "node:a%0Ab"):
        await api.get(f"{PATH}{bad}/", status=400)


async def test_what_contradicts_in_another_scope_is_refused(api: Api) -> None:
    await api.send("PATCH", PATH, {"auth_token": TOKEN})
    await api.send("PATCH", f"{PATH}app:scanner/", {"auth_enabled": True})
    field, says = problem(await api.send("PATCH", PATH, {"auth_token": None}, status=400))
    assert field == "auth_enabled" and "app:scanner" in says


async def test_what_contradicts_in_application_and_node_together_is_refused(api: Api, ingest: Ingest) -> None:
    await api.send("PATCH", PATH, {"auth_token": TOKEN})
    await api.send("PATCH", f"{PATH}app:scanner/", {"auth_enabled": False, "auth_token": ""})
    field, says = problem(await api.send("PATCH", f"{PATH}node:capture-0/", {"auth_enabled": True}, status=400))
    assert field == "auth_enabled" and "(in app:scanner)" in says
    # A node that is known to be of another application never meets it.
    await api.publish(a_status(api, source_app="browser"))
    await nodes(api, 1)
    await api.send("PATCH", f"{PATH}node:capture-0/", {"auth_enabled": True})
    refused = await api.send("PATCH", f"{PATH}app:browser/", {"auth_token": ""}, status=400)
    assert "(in node:capture-0)" in problem(refused)[1]
    await api.send("PATCH", f"{PATH}node:capture-0/", {"auth_enabled": None})
    await api.send("PATCH", f"{PATH}app:browser/", {"auth_token": ""})


async def test_two_editors_do_not_overwrite_each_other(api: Api) -> None:
    await published(api)
    seen = (await api.send("PATCH", PATH, {"max_body_size": 1}))["version"]
    await api.send("PATCH", PATH, {"version": seen, "max_body_size": 2})
    refused = await api.send("PATCH", PATH, {"version": seen, "max_body_size": 3}, status=409)
    assert refused["error"]["details"]["version"] == seen + 1
    answer = await api.client.get(PATH)
    tag = answer.headers["etag"]
    assert tag == f'"{seen + 1}"'
    put = {"json": {"max_body_size": 4}, "headers": {"If-Match": tag}}
    assert (await api.client.put(PATH, **put)).status_code == 200
    assert (await api.client.put(PATH, **put)).status_code == 412
    assert (await api.get(PATH))["max_body_size"] == 4
    new = await api.send("PATCH", f"{PATH}app:new/", {"version": 0, "max_body_size": 5})
    assert new["max_body_size"] == 5


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ('"{0}"', 200),
        ('"0", "{0}"', 200),
        ('"a,b",, "{0}" ,', 200),
        ("*", 200),
        ('W/"{0}"', 412),
        ('"0", "99"', 412),
        ("{0}", 412),
        ('"{0}" nonsense', 412),
        ("", 412),
    ],
)
async def test_if_match_is_a_list_of_strong_tags(api: Api, sent: str, status: int) -> None:
    """RFC 9110, section 13.1.1."""
    version = (await published(api)).version
    headers = {"If-Match": sent.format(version)}
    answer = await api.client.patch(PATH, json={"max_body_size": 4}, headers=headers)
    assert answer.status_code == status, answer.text


async def test_a_poll_is_answered_in_full_only_when_something_changed(api: Api) -> None:
    await published(api)
    path, query = f"{PATH}active/", {"source_app": "a", "node": "n"}

    async def poll(tag: str) -> tuple[int, str]:
        answer = await api.client.get(path, params=query, headers={"If-None-Match": tag})
        assert bool(answer.content) == (answer.status_code == 200)
        return answer.status_code, answer.headers["etag"]

    status, tag = await poll('"other"')
    assert status == 200 and await poll(tag) == (304, tag) and await poll(f'"x", W/{tag}') == (304, tag)
    for scope, seen in (("", True), ("app:a/", True), ("node:n/", True), ("app:other/", False)):
        await api.send("PATCH", f"{PATH}{scope}", {"max_body_size": 9})
        status, now = await poll(tag)
        assert (status, now != tag) == ((200, True) if seen else (304, False)), scope
        tag = now
    await api.post("/interceptor/api/payload-rules/", RULE)
    assert (await poll(tag))[0] == 200


async def test_a_snapshot_is_bounded_as_it_is_published(api: Api) -> None:
    """A control character takes one byte in Postgres and six in JSON."""
    path = "/interceptor/api/payload-rules/"
    rule = RULE | {"payload_content": "\x01" * 60_000}
    made = [await api.post(path, rule)]
    refused = await api.post(path, rule, status=400)
    assert refused["error"]["code"] == "too_many_rules" and "600000 are allowed" in refused["error"]["message"]
    for one in made:
        await api.send("DELETE", f"{path}{one['id']}/", status=204)


RULE = {
    "name": "r",
    "target_url_pattern": ".",
    "injection_type": "header",
    "injection_point": "X",
    "payload_content": "1",
}


async def test_changes_side_by_side_get_versions_of_their_own(api: Api) -> None:
    before = (await published(api)).version
    paths = [PATH, f"{PATH}app:a/", f"{PATH}node:b/"]
    found = await asyncio.gather(
        *(api.send("PATCH", paths[number % 3], {"max_body_size": number}) for number in range(1, 13))
    )
    history = (await api.get(f"{PATH}history/"))["changes"]
    assert sorted(change["version"] for change in history) == list(range(before + 1, before + 13))
    assert len(found) == 12


async def test_passthrough_by_one_click(api: Api) -> None:
    for host in ("Bank.example", "other.example", "bank.example"):
        found = await api.post(f"{PATH}passthrough/", {"host": f" {host} "}, status=200)
    assert found["passthrough_hosts"] == "bank.example, other.example"
    found = await api.send("DELETE", f"{PATH}passthrough/?host=bank.example")
    assert found["passthrough_hosts"] == "other.example"
    await api.send("DELETE", f"{PATH}passthrough/?host=bank.example", status=404)
    for host in ("", "a b", "x" * 300):
        await api.post(f"{PATH}passthrough/", {"host": host}, status=400)


async def test_rules_are_audited_too(api: Api) -> None:
    path = "/interceptor/api/payload-rules/"
    made = await api.post(path, RULE)
    await api.send("PATCH", f"{path}{made['id']}/", {"active": False})
    await api.send("DELETE", f"{path}{made['id']}/", status=204)
    removed, changed, created = (
        change["changes"][f"payload_rules.{made['id']}"] for change in (await api.get(f"{PATH}history/"))["changes"]
    )
    assert (created["old"], created["new"]["name"]) == (None, "r")
    assert (changed["old"]["active"], changed["new"]["active"]) == (True, False)
    assert removed["new"] is None


async def test_every_scope_is_published_again_at_the_start_and_above_what_the_bus_has(settings: Settings) -> None:
    bus = LocalBus(settings.common.data_dir)
    async with running(settings, bus) as api:
        version = (await api.send("PATCH", f"{PATH}app:scanner/", {"max_body_size": 1}))["version"]
        await published(api, "app:scanner", version)
    (settings.common.data_dir.config / "app:scanner").unlink()
    async with running(settings, bus) as api:
        assert (await published(api, "app:scanner")).version == version
    await bus.put_config("app:scanner", encode_snapshot(Snapshot(scope="app:scanner", version=70)))
    async with running(settings, bus) as api:
        found = await published(api, "app:scanner", 71)
        assert found.settings.max_body_size == 1
        assert (await api.send("PATCH", PATH, {"max_body_size": 2}))["version"] > found.version


async def test_a_new_database_takes_over_what_the_bus_has(settings: Settings) -> None:
    bus = LocalBus(settings.common.data_dir)
    rule = PayloadRule(id=77, target_apps=("a",), **RULE)
    said = ProxySettings(auth_enabled=True, auth_token_hash="$argon2id$x", ip_blacklist="10.0.0.0/8")
    await bus.put_config("global", encode_snapshot(Snapshot(scope="global", version=70, settings=said, rules=(rule,))))
    async with running(settings, bus) as api:
        found = await published(api, at_least=71)
        assert (found.version, found.settings) == (71, said)
        assert [(one.name, one.target_apps) for one in found.rules] == [("r", ("a",))]
        shown = await api.get(PATH)
        assert (shown["auth_enabled"], shown["auth_token_set"], shown["ip_blacklist"]) == (True, True, "10.0.0.0/8")
        [change] = (await api.get(f"{PATH}history/"))["changes"]
        assert (change["version"], change["changed_by"]) == (71, "imported from the bus")
        assert change["changes"]["ip_blacklist"] == {"old": None, "new": "10.0.0.0/8"} and "argon2" not in str(change)
    async with running(settings, bus) as api:
        assert (await api.get(f"{PATH}history/"))["total"] == 1 and len(await api.get(f"{PATH}active/")) == 1


async def test_every_scope_of_the_bus_is_taken_over(settings: Settings) -> None:
    """Also one that denies more than the global one, and in the order in which they were said."""
    bus = LocalBus(settings.common.data_dir)
    rule = PayloadRule(id=77, **RULE)
    told = [
        Snapshot(scope="node:n-0", version=70, settings=ProxySettings(ip_blacklist="10.0.0.0/8")),
        Snapshot(scope="global", version=72, settings=ProxySettings(auth_token_hash="$argon2id$x"), rules=(rule,)),
        Snapshot(scope="app:a b/c", version=71, settings=ProxySettings(auth_enabled=True), rules=(rule,)),
        Snapshot(scope="app:left", version=80),
    ]
    for snapshot in told:
        await bus.put_config(snapshot.scope, encode_snapshot(snapshot))
    await bus.put_config("app:broken", b"{")
    await bus.put_config("app:liar", encode_snapshot(Snapshot(scope="global", version=99)))
    async with running(settings, bus) as api:
        node, app, top = [await published(api, scope, 71) for scope in ("node:n-0", "app:a b/c", "global")]
        assert (node.version, app.version, top.version) == (71, 72, 73)
        assert (node.settings, app.settings, top.settings) == (told[0].settings, told[2].settings, told[1].settings)
        assert [len(snapshot.rules) for snapshot in (node, app, top)] == [0, 0, 1], "rules are in the global one"
        changes = (await api.get(f"{PATH}history/"))["changes"]
        assert [(change["version"], change["scope"]) for change in changes] == [
            (73, "global"),
            (72, "app:a b/c"),
            (71, "node:n-0"),
        ]
        changed = await api.send("PATCH", f"{PATH}app:left/", {"max_body_size": 1})
        assert (await published(api, "app:left", 81)).settings.max_body_size == 1, "above what proxies know of it"
        assert changed["version"] == 74


async def test_a_bus_without_a_global_scope_gives_its_others(settings: Settings) -> None:
    bus = LocalBus(settings.common.data_dir)
    said = ProxySettings(ip_blacklist="10.0.0.0/8")
    await bus.put_config("app:a", encode_snapshot(Snapshot(scope="app:a", version=70, settings=said)))
    async with running(settings, bus) as api:
        assert (await published(api, "app:a", 71)).settings == said
        assert (await published(api)).settings == ProxySettings()


async def test_hostile_values_on_the_bus_are_replaced(settings: Settings) -> None:
    bus = LocalBus(settings.common.data_dir)
    async with running(settings, bus) as api:
        await published(api)
    nested = b'{"scope":"global","version":1,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for hostile in (nested, b'{"scope":"global","version":99999999999999999999}'):
        await bus.put_config("global", hostile)
        async with running(settings, bus) as api:
            version = (await api.send("PATCH", PATH, {"max_body_size": len(hostile)}))["version"]
            found = await eventually(partial(readable, bus, version), "one that can be read")
            assert found is not None
            assert found.settings.max_body_size == len(hostile)


async def readable(bus: LocalBus, version: int) -> Snapshot | None:
    try:
        found = decode_snapshot(await bus.get_config("global") or b"")
    except msgspec.DecodeError:
        return None
    return found if found.version >= version else None
