"""Payload rules: kept, checked, and published to every proxy."""

import asyncio
from typing import Any

import httpx
import psycopg
import pytest

from megido_api.settings import Settings
from megido_shared.bus.local import LocalBus
from megido_shared.config import Snapshot, decode_snapshot, encode_snapshot
from megido_shared.errors import Unavailable
from tests.integration.api.harness import Api, eventually, running

PATH = "/interceptor/api/payload-rules/"
RULE: dict[str, Any] = {
    "name": "trace",
    "target_url_pattern": r"https?://api\.example\.com/",
    "injection_type": "header",
    "injection_point": "X-Trace",
    "payload_content": "1",
}
BROKEN = b"{broken"
FIELDS = {
    *("id", "name", "target_url_pattern", "injection_type", "injection_point", "payload_content", "active"),
    *("target_apps", "created_by", "created_by_username", "created_at", "updated_at", "hits", "last_hit_at"),
}


async def published(api: Api, at_least: int = 1) -> Snapshot:
    """The snapshot that proxies get, once its version is that high."""

    async def current() -> Snapshot | None:
        raw = await api.bus.get_config("global")
        found = None if raw in (None, BROKEN) else decode_snapshot(raw)
        return found if found is not None and found.version >= at_least else None

    found = await eventually(current, f"version {at_least}")
    assert found is not None
    return found


async def test_create_read_update_delete(api: Api) -> None:
    first = await published(api)
    assert (first.scope, first.rules) == ("global", ())
    created = await api.post(PATH, RULE)
    assert set(created) >= FIELDS
    assert {name: created[name] for name in RULE} == RULE
    assert (created["active"], created["target_apps"], created["hits"], created["last_hit_at"]) == (True, [], 0, None)
    number = created["id"]
    one = f"{PATH}{number}/"
    assert await api.get(one) == created
    assert await api.get(PATH) == [created]
    snapshot = await published(api, first.version + 1)
    assert [(rule.id, rule.name, rule.injection_point) for rule in snapshot.rules] == [(number, "trace", "X-Trace")]

    patched = await api.send("PATCH", one, {"target_apps": ["scanner"], "payload_content": "2"})
    assert (patched["target_apps"], patched["payload_content"], patched["name"]) == (["scanner"], "2", "trace")
    assert patched["updated_at"] > created["updated_at"]
    assert (await published(api, snapshot.version + 1)).rules[0].target_apps == ("scanner",)

    replaced = await api.send("PUT", one, RULE | {"name": "other", "active": False})
    assert (replaced["name"], replaced["active"], replaced["target_apps"]) == ("other", False, [])
    assert (await published(api, snapshot.version + 2)).rules == ()

    assert await api.send("DELETE", one, status=204) is None
    last = await published(api, snapshot.version + 3)
    assert last.version == snapshot.version + 3
    for method in ("GET", "DELETE"):
        assert (await api.send(method, one, status=404))["error"]["code"] == "not_found"
    await api.send("PATCH", one, {"name": "x"}, status=404)
    await api.send("PUT", one, RULE, status=404)


async def test_active_by_application(api: Api) -> None:
    everywhere = await api.post(PATH, RULE | {"name": "everywhere"})
    scanner = await api.post(PATH, RULE | {"name": "scanner only", "target_apps": ["scanner", "fuzzer"]})
    await api.post(PATH, RULE | {"name": "off", "active": False})

    async def names(**params: Any) -> list[str]:
        found = await api.get(f"{PATH}active/", **params)
        assert (found["success"], found["count"]) == (True, len(found["rules"]))
        return [rule["name"] for rule in found["rules"]]

    assert await names(source_app="browser") == ["everywhere"]
    assert await names(source_app="scanner") == ["everywhere", "scanner only"]
    assert await names(source_app="scan") == ["everywhere"]
    assert await names() == ["everywhere", "scanner only"]
    assert (await api.get(f"{PATH}active/", source_app="fuzzer"))["rules"] == [everywhere, scanner]


async def test_search_and_ordering(api: Api) -> None:
    for name, point in (("b", "X-One"), ("a", "X-Two"), ("c_%", "X-Three")):
        await api.post(PATH, RULE | {"name": name, "injection_point": point})

    async def names(**params: Any) -> list[str]:
        return [rule["name"] for rule in await api.get(PATH, **params)]

    assert await names() == ["c_%", "a", "b"]
    assert await names(ordering="name") == ["a", "b", "c_%"]
    assert await names(ordering="-name") == ["c_%", "b", "a"]
    assert await names(ordering="active,-id") == ["c_%", "a", "b"]
    assert await names(search="TWO") == ["a"]
    assert await names(search="_%") == ["c_%"]
    refused = await api.get(PATH, status=400, ordering="payload_content; --")
    assert refused["error"]["details"]["fields"][0]["field"] == "ordering"


async def test_what_could_not_work_is_refused_with_its_field(api: Api) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"target_url_pattern": "a(b"}, "target_url_pattern"),
        ({"target_url_pattern": "(?=look)"}, "target_url_pattern"),
        ({"target_url_pattern": r"(a)\1"}, "target_url_pattern"),
        ({"target_url_pattern": "x" * 5000}, "target_url_pattern"),
        ({"target_url_pattern": "nul\0"}, "target_url_pattern"),
        ({"injection_type": "query"}, "injection_type"),
        ({"injection_point": ""}, "injection_point"),
        ({"injection_point": "X Y"}, "injection_point"),
        ({"injection_point": "X-A:\r\nX-B"}, "injection_point"),
        ({"injection_point": "Content-Length"}, "injection_point"),
        ({"injection_point": "transfer-encoding"}, "injection_point"),
        ({"injection_point": "Proxy-Authorization"}, "injection_point"),
        ({"injection_point": ":path"}, "injection_point"),
        ({"target_url_pattern": r"http[\pL\pN]{20}7"}, "target_url_pattern"),
        ({"payload_content": "1\r\nX-B: 2"}, "payload_content"),
        ({"injection_type": "cookie", "payload_content": "1\n2"}, "payload_content"),
        ({"name": ""}, "name"),
        ({"name": "\0"}, "name"),
        ({"name": None}, "name"),
        ({"active": "perhaps"}, "active"),
        ({"target_apps": "browser"}, "target_apps"),
        ({"target_apps": [""]}, "target_apps.0"),
    ]
    kept = await api.post(PATH, RULE)
    for change, field in cases:
        for method, path, document in (
            ("POST", PATH, RULE | change),
            ("PUT", f"{PATH}{kept['id']}/", RULE | change),
            ("PATCH", f"{PATH}{kept['id']}/", change),
        ):
            found = await api.send(method, path, document, status=400)
            assert [entry["field"] for entry in found["error"]["details"]["fields"]] == [field], (method, change)
    for missing in RULE:
        found = await api.post(PATH, {name: value for name, value in RULE.items() if name != missing}, status=400)
        assert [entry["field"] for entry in found["error"]["details"]["fields"]] == [missing]
    assert await api.get(PATH) == [kept]


async def test_a_pattern_error_has_its_position(api: Api) -> None:
    found = await api.post(PATH, RULE | {"target_url_pattern": "abc[z"}, status=400)
    assert found["error"]["details"]["fields"][0]["position"] == 3
    found = await api.post(PATH, RULE | {"target_url_pattern": "a(b"}, status=400)
    assert found["error"]["details"]["fields"][0]["position"] == 3


async def test_a_patch_is_checked_with_what_it_leaves(api: Api) -> None:
    one = await api.post(PATH, RULE | {"injection_type": "body", "injection_point": "a.b c", "payload_content": "\n"})
    refused = await api.send("PATCH", f"{PATH}{one['id']}/", {"injection_type": "header"}, status=400)
    assert refused["error"]["details"]["fields"][0]["field"] == "injection_point"
    assert (await api.get(f"{PATH}{one['id']}/"))["injection_type"] == "body"


async def test_too_many_rules_for_one_snapshot(api: Api) -> None:
    before = (await published(api)).version
    for _ in range(9):
        await api.post(PATH, RULE | {"payload_content": "x" * 65_000})
    refused = await api.post(PATH, RULE | {"payload_content": "x" * 65_000}, status=400)
    assert refused["error"]["code"] == "too_many_rules"
    assert len(await api.get(PATH)) == 9
    inactive = await api.post(PATH, RULE | {"payload_content": "x" * 65_000, "active": False})
    assert inactive["id"]
    assert len((await published(api, before + 10)).rules) == 9


async def test_more_active_rules_than_a_proxy_applies(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megido_api.rules.endpoints.MAX_ACTIVE", 2)
    rules = [await api.post(PATH, RULE) for _ in range(2)]
    assert (await api.post(PATH, RULE, status=400))["error"]["code"] == "too_many_rules"
    off = await api.post(PATH, RULE | {"active": False})
    one = f"{PATH}{off['id']}/"
    assert (await api.send("PATCH", one, {"active": True}, status=400))["error"]["code"] == "too_many_rules"
    await api.send("PATCH", f"{PATH}{rules[0]['id']}/", {"active": False})
    assert (await api.send("PATCH", one, {"active": True}))["active"]


async def test_changes_side_by_side_get_versions_of_their_own(api: Api) -> None:
    before = (await published(api)).version
    await asyncio.gather(*(api.post(PATH, RULE | {"name": f"rule {number}"}) for number in range(12)))
    snapshot = await published(api, before + 12)
    assert snapshot.version == before + 12
    assert len(snapshot.rules) == 12


async def test_published_again_at_the_start_and_above_what_the_bus_has(settings: Settings) -> None:
    bus = LocalBus(settings.common.data_dir)
    async with running(settings, bus) as api:
        await published(api)  # what the start publishes; a rule before it would be part of that version
        await api.post(PATH, RULE)
        version = (await published(api, 2)).version
    (settings.common.data_dir.config / "global").unlink()
    async with running(settings, bus) as api:
        found = await published(api)
        assert (found.version, len(found.rules)) == (version, 1)
    # A new database under an old bus: proxies would ignore a lower version.
    await bus.put_config("global", encode_snapshot(Snapshot(scope="global", version=70)))
    async with running(settings, bus) as api:
        found = await published(api, 71)
        assert (found.version, len(found.rules)) == (71, 1)
    await bus.put_config("global", BROKEN)
    async with running(settings, bus) as api:
        assert (await published(api, 71)).version == 71


class Away(LocalBus):
    """A local bus that cannot be reached while `away`."""

    away = True

    async def put_config(self, scope: str, value: bytes) -> None:
        if self.away:
            raise Unavailable("the bus is away")
        await super().put_config(scope, value)

    async def ping(self) -> None:
        if self.away:
            raise Unavailable("the bus is away")


async def test_the_bus_away_loses_no_change(settings: Settings) -> None:
    bus = Away(settings.common.data_dir)
    async with running(settings, bus) as api:
        await api.post(PATH, RULE)
        not_ready = await api.get("/readyz", status=503)
        assert not_ready["error"]["details"]["missing"] == ["bus: the bus is away"]
        bus.away = False
        assert len((await published(api)).rules) == 1
        assert (await api.client.get("/readyz")).status_code == 200


async def tag_of(api: Api, path: str) -> str:
    answer = await api.client.get(path)
    assert answer.headers["etag"] == answer.json()["etag"]
    return answer.headers["etag"]


async def test_two_editors_do_not_overwrite_each_other(api: Api) -> None:
    created = await api.client.post(PATH, json=RULE)
    path, first = f"{PATH}{created.json()['id']}/", created.headers["etag"]
    assert await tag_of(api, path) == first and [rule["etag"] for rule in await api.get(PATH)] == [first]

    async def send(method: str, tag: str, document: dict[str, Any] | None = None) -> httpx.Response:
        return await api.client.request(method, path, json=document, headers={"If-Match": tag})

    patched = await send("PATCH", f'"other", {first}', {"payload_content": "2"})
    second = patched.headers["etag"]
    assert (patched.status_code, await tag_of(api, path)) == (200, second) and second != first
    version = (await api.get("/proxy/api/config/"))["version"]
    for method, document in (("PATCH", {"payload_content": "3"}), ("PUT", RULE), ("DELETE", None)):
        for tag in (first, f"W/{second}", "nonsense", ""):
            refused = await send(method, tag, document)
            assert refused.status_code == 412, (method, tag)
            error = refused.json()["error"]
            assert error["code"] == "conflict" and error["details"] == {"etag": second}
    assert (await api.get(path))["payload_content"] == "2"
    assert (await api.get("/proxy/api/config/"))["version"] == version, "what is refused is no version"
    replaced = await send("PUT", second, RULE)
    assert replaced.status_code == 200 and replaced.headers["etag"] not in (first, second), "the same again is new"
    assert (await send("DELETE", "*")).status_code == 204
    assert (await send("DELETE", "*")).status_code == 404


async def test_of_two_editors_at_the_same_moment_one_wins(api: Api) -> None:
    created = await api.client.post(PATH, json=RULE)
    path, headers = f"{PATH}{created.json()['id']}/", {"If-Match": created.headers["etag"]}
    answers = await asyncio.gather(
        *(api.client.patch(path, json={"payload_content": str(n)}, headers=headers) for n in range(8))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 7
    [winner] = [answer.json() for answer in answers if answer.status_code == 200]
    assert await api.get(path) == winner


async def test_hits_are_no_change(api: Api, settings: Settings) -> None:
    created = await api.client.post(PATH, json=RULE)
    path = f"{PATH}{created.json()['id']}/"
    async with await psycopg.AsyncConnection.connect(settings.common.database_url) as connection:
        await connection.execute("UPDATE payload_rules SET hits = hits + 1, last_hit_at = now()")
    assert (await api.get(path))["hits"] == 1
    headers = {"If-Match": created.headers["etag"]}
    assert (await api.client.patch(path, json={"name": "n"}, headers=headers)).status_code == 200
