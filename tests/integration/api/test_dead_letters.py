"""Dead letters: listed, shown, put through ingest again, discarded; and accounting stays right throughout."""

import base64
from typing import Any

import psycopg
import pytest

from megido_api.deadletters import queries
from megido_api.settings import Settings
from megido_shared import events, ids
from megido_shared.bus.base import Outgoing
from megido_shared.bus.topics import AUTH, DEAD_LETTERS, FLOWS
from megido_shared.db import outbox
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.api.harness import Api, Ingest, eventually, on_topic
from tests.integration.ingest.support import rows

NOTHING: dict[str, Any] = {"queued": 0, "more": False, "last_id": None, "too_large": 0}
PATH = "/proxy/api/dead-letters/"


def refused_flow(seq: int) -> events.FlowCompleted:
    """One that Postgres refuses while `refuse` says so."""
    return a_completed_flow(seq=seq, request=a_request(host="refused.example"))


def refuse(settings: Settings, refused: bool) -> None:
    """What a version with a defect would do, and one without."""
    change = (
        "ADD CONSTRAINT refused CHECK (host <> 'refused.example') NOT VALID" if refused else "DROP CONSTRAINT refused"
    )
    with psycopg.connect(settings.common.database_url, autocommit=True) as connection:
        connection.execute(f"ALTER TABLE flows {change}")


def accounted(settings: Settings) -> dict[str, int]:
    found = rows(settings.common.database_url, "SELECT kind, sum(value)::bigint FROM accounting GROUP BY kind")
    return {kind: count for kind, count in found if count}


async def send(api: Api, *records: Outgoing) -> None:
    producer = await api.bus.producer("test")
    await producer.append(records)
    await producer.close()


async def letters(api: Api, count: int, **params: Any) -> list[dict[str, Any]]:
    async def enough() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await api.get(PATH, **params))["dead_letters"]
        return found if len(found) == count else []

    return await eventually(enough, f"{count} dead letters with {params}")


async def state_of(api: Api, letter_id: int, wanted: str, attempts: int) -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        found: dict[str, Any] = await api.get(f"{PATH}{letter_id}/")
        return found if (found["state"], found["attempts"]) == (wanted, attempts) else None

    found = await eventually(there, f"dead letter {letter_id} is {wanted} at attempt {attempts}")
    assert found
    return found


async def test_listed_filtered_paged_and_shown(api: Api, ingest: Ingest) -> None:
    flow = refused_flow(1)
    unknown = events.encode(flow).replace(b"FlowCompleted", b"FlowRenewedXX")
    await send(
        api,
        Outgoing(FLOWS.name, b"k1", b"\xc1\x00 no event"),
        Outgoing(FLOWS.name, b"k2", unknown),
        Outgoing(AUTH.name, b"k3", b"\xc1"),
    )
    found = await letters(api, 3)
    assert [one["state"] for one in found] == ["new"] * 3
    assert [one["topic"] for one in await letters(api, 1, topic=AUTH.name)] == [AUTH.name]
    (renewed,) = await letters(api, 1, reason="flowRENEWEDxx")
    assert (renewed["event_type"], renewed["attempts"], renewed["changed_by"]) == ("FlowRenewedXX", 0, None)
    assert renewed["size"] == len(unknown)
    assert (await api.get(PATH, reason="%"))["total"] == 0, "a substring, no pattern"
    assert (await api.get(PATH, state="discarded"))["total"] == 0
    for parameter in ("states", "offset"):
        await api.get(PATH, 400, **{parameter: "new"})
    await api.get(PATH, 400, state="gone")

    pages, cursor = [], {}
    for _ in range(3):
        page = await api.get(PATH, limit=1, **cursor)
        pages += page["dead_letters"]
        cursor = {"cursor": page["next_cursor"]}
        assert page["total"] == 3
    assert pages == found
    assert page["next_cursor"] is None

    shown = await api.get(f"{PATH}{renewed['id']}/")
    assert base64.b64decode(shown["value_base64"]) == unknown
    assert base64.b64decode(shown["key_base64"]) == b"k2"
    assert shown["decoded"]["flow_id"] == {"hex": flow.flow_id.hex()}
    assert shown["decoded"]["request"]["host"] == "refused.example"
    (junk,) = await letters(api, 1, topic=AUTH.name)
    assert (await api.get(f"{PATH}{junk['id']}/"))["decoded"] is None
    await api.get(f"{PATH}{2**62}/", 404)


@pytest.mark.parametrize("deep", [b"\x91" * 300_000, b"\x81\xa1x" + b"\x91" * 300_000], ids=["list", "field"])
async def test_what_is_nested_too_deeply_is_a_dead_letter_and_no_crash(api: Api, ingest: Ingest, deep: bytes) -> None:
    flow = a_completed_flow(seq=1)
    await send(api, Outgoing(FLOWS.name, b"k", deep), outbox.outgoing(flow))
    (letter,) = await letters(api, 1)
    assert "Recursion" in letter["reason"] or "Validation" in letter["reason"]
    assert (await api.get(f"{PATH}{letter['id']}/"))["decoded"] is None
    await api.stored("")


async def test_redriven_once_it_can_be_stored_and_counted_once(api: Api, ingest: Ingest, settings: Settings) -> None:
    refuse(settings, True)
    bad, good = refused_flow(1), a_completed_flow(seq=2)
    await api.publish(bad, good)
    (letter,) = await letters(api, 1)
    await api.stored("")
    assert accounted(settings) == {"stored": 1, "dead_lettered": 1}

    queued = await api.send("POST", f"{PATH}{letter['id']}/redrive/", status=202)
    assert (queued["state"], queued["attempts"]) == ("queued", 1)
    again = await state_of(api, letter["id"], "new", 1)
    assert "CheckViolation" in again["reason"]
    assert accounted(settings) == {"stored": 1, "dead_lettered": 1}
    copies = await on_topic(api.bus, DEAD_LETTERS, 2)
    assert [copy.value for copy in copies] == [events.encode(bad)] * 2

    refuse(settings, False)
    await api.send("POST", f"{PATH}{letter['id']}/redrive/", status=202)
    done = await state_of(api, letter["id"], "redriven", 2)
    assert done["changed_by"]
    assert accounted(settings) == {"stored": 2}
    url = settings.common.database_url
    assert rows(url, "SELECT seq FROM flows WHERE flow_id = %s", [ids.to_uuid(bad.flow_id)]) == [(1,)]
    await api.send("POST", f"{PATH}{letter['id']}/redrive/", status=409)
    await api.send("DELETE", f"{PATH}{letter['id']}/", status=409)
    await api.send("POST", f"{PATH}{2**62}/redrive/", status=404)

    # All of it once more: what was redriven stays so, and nothing is counted again.
    await ingest.stop()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute('UPDATE ingest_offsets SET "offset" = 0, last_event_id = %s', [b""])
    await ingest.start()
    await api.publish(last := a_completed_flow(seq=3))

    async def arrived() -> bool:
        return bool(rows(url, "SELECT 1 FROM flows WHERE flow_id = %s", [ids.to_uuid(last.flow_id)]))

    await eventually(arrived, "what came after the redelivery")
    assert accounted(settings) == {"stored": 3}
    assert [one["state"] for one in await letters(api, 1)] == ["redriven"]


async def test_many_by_filter(api: Api, ingest: Ingest, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(settings, True)
    flows = [refused_flow(seq) for seq in range(1, 6)]
    junk = Outgoing(AUTH.name, b"k", b"\xc1")
    await send(api, *[outbox.outgoing(flow) for flow in flows], junk)
    await letters(api, 6)
    refuse(settings, False)
    monkeypatch.setattr(queries, "MOST_REDRIVEN", 3)
    wanted = {"topic": FLOWS.name, "reason": "violates"}
    bulk = f"{PATH}redrive/"
    first = await api.post(bulk, wanted, 202)
    assert (first["queued"], first["more"], first["too_large"]) == (3, True, 0)
    second = await api.post(bulk, wanted | {"after": first["last_id"]}, 202)
    assert (second["queued"], second["more"]) == (2, False)
    assert await api.post(bulk, wanted | {"after": second["last_id"]}, 202) == NOTHING
    await letters(api, 5, state="redriven")
    (left,) = await letters(api, 1, state="new")
    assert left["topic"] == AUTH.name
    assert accounted(settings) == {"stored": 5, "dead_lettered": 1}
    await api.post(bulk, {"topics": "x"}, 400)
    await api.post(bulk, {"state": "redriven"}, 400)


async def test_discarded_by_whom_and_when_and_redriven_after_all(api: Api, ingest: Ingest) -> None:
    await send(api, Outgoing(AUTH.name, b"k", b"\xc1"))
    (letter,) = await letters(api, 1)
    await api.send("DELETE", f"{PATH}{letter['id']}/", status=204)
    found = await api.get(f"{PATH}{letter['id']}/")
    assert (found["state"], found["changed_by"]) == ("discarded", "127.0.0.1")
    assert found["changed_at"] >= found["created_at"]
    assert await api.post(f"{PATH}redrive/", {}, 202) == NOTHING
    await api.send("POST", f"{PATH}{letter['id']}/redrive/", status=202)
    await state_of(api, letter["id"], "new", 1)
    await api.send("DELETE", f"{PATH}{2**62}/", status=404)


async def test_what_no_bus_takes_is_not_queued(api: Api, settings: Settings) -> None:
    with psycopg.connect(settings.common.database_url, autocommit=True) as connection:
        connection.execute(
            'INSERT INTO dead_letters (source_id, topic, partition, "offset", event_type, reason, key, value, state,'
            " created_at) VALUES ('s', 'megido.flows', 0, 0, '', 'r', '', %s, 'new', now())",
            [bytes(outbox.MAX_RECORD_BYTES)],
        )
    (letter,) = await letters(api, 1)
    await api.send("POST", f"{PATH}{letter['id']}/redrive/", status=413)
    assert await api.post(f"{PATH}redrive/", {}, 202) == NOTHING | {"too_large": 1}
    assert (await api.get(f"{PATH}{letter['id']}/"))["state"] == "new"
