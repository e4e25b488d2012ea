"""Accounting on real journals, read by the real store, against what the test itself counted while it wrote them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psycopg

from megido_api.settings import Settings
from megido_shared import events, ids
from megido_shared.bus.local import Journal
from megido_shared.bus.topics import FLOWS
from megido_shared.datadir import DataDir
from megido_shared.db.connect import conninfo
from megido_shared.events import AuthAttempted, ErrorRaised, ErrorType, Failure, NodeStatus, WebSocketMessage
from megido_shared.testing import a_completed_flow
from tests.integration.api.harness import Api, Ingest, eventually

PATH = "/proxy/api/accounting/"
NOTHING = {
    "waiting": 0,
    "since_heartbeat": 0,
    "dead_lettered": 0,
    "dropped": {},
    "expired": 0,
    "corrupt": 0,
    "unexplained": 0,
}


@dataclass
class Node:
    """Writes as a capture node does, and keeps its own count of what it was asked to record."""

    data_dir: DataDir
    cap_bytes: int = 1 << 30
    journal: Journal = field(init=False)
    asked: int = 0

    def __post_init__(self) -> None:
        self.journal = Journal.open(self.data_dir, "capture", cap_bytes=self.cap_bytes)

    def identity(self, *, terminal: bool = True) -> dict[str, Any]:
        self.asked += terminal
        return {
            "event_id": ids.new_id(),
            "node": self.journal.node,
            "epoch": self.journal.epoch,
            "seq": self.journal.next_seq() if terminal else 0,
            "time_us": ids.time_ms(ids.new_id()) * 1000,
        }

    def flows(self, count: int, *, size: int = 10) -> None:
        for _ in range(count):
            flow = a_completed_flow(**self.identity())
            body = events.Body(data=bytes(size), size=size)
            self.journal.publish(msgspec.structs.replace(flow, request=_with(flow.request, body)))

    def others(self) -> None:
        """One of each other kind."""
        flow_id = ids.new_id()
        self.journal.publish(
            WebSocketMessage(
                **self.identity(),
                message_id=ids.new_id(),
                flow_id=flow_id,
                connection_id=f"ws_{flow_id.hex()}",
                url="ws://a.example/",
                direction="SEND",
                message_type="TEXT",
            )
        )
        why = Failure(ErrorType.SSL_ERROR, "no trust")
        self.journal.publish(ErrorRaised(**self.identity(), error_id=ids.new_id(), failure=why))
        self.journal.publish(AuthAttempted(**self.identity(), auth_id=ids.new_id(), success=False))

    def beat(self) -> None:
        status = NodeStatus(
            **self.identity(terminal=False),
            state="running",
            counters=self.journal.figures(),
            captured=self.journal.last_seq,
        )
        assert self.journal.publish(status)

    def segments(self, topic: str = FLOWS.name) -> list[Path]:
        return sorted((self.data_dir.bus / self.journal.node).glob(f"{topic}.*.log"))


def _with(request: events.Request, body: events.Body) -> events.Request:
    return msgspec.structs.replace(request, body=body)


@contextmanager
def a_node(settings: Settings, **options: Any) -> Iterator[Node]:
    node = Node(settings.common.data_dir, **options)
    try:
        yield node
    finally:
        node.journal.close()


async def settled(api: Api, node: Node) -> dict[str, Any]:
    """The whole answer once all of the node's records are stored or known not to be, and its heartbeat is the last."""

    async def exact() -> dict[str, Any]:
        found: dict[str, Any] = await api.get(PATH)
        nodes = found["nodes"]
        done = len(nodes) == 1 and found["exact"] and not nodes[0]["waiting"] and nodes[0]["captured"] == node.asked
        return found if done else {}

    return await eventually(exact, "accounting is exact")


def account(found: dict[str, Any]) -> dict[str, Any]:
    (node,) = found["nodes"]
    for shown in (node, found["total"]):
        parts = (shown[name] for name in ("stored", *NOTHING) if name != "dropped")
        assert shown["captured"] == sum(parts) + sum(shown["dropped"].values()), "the sum is the sum"
    assert isinstance(node, dict)
    return node


def figures(node: dict[str, Any]) -> dict[str, Any]:
    return {name: node[name] for name in NOTHING}


async def test_a_clean_run_balances(api: Api, ingest: Ingest, settings: Settings) -> None:
    assert (await api.get(PATH))["balanced"]
    with a_node(settings) as node:
        node.flows(50)
        node.others()
        node.beat()
        found = await settled(api, node)
    shown = account(found)
    assert (shown["captured"], shown["stored"]) == (node.asked, node.asked) == (53, 53)
    assert figures(shown) == figures(found["total"]) == NOTHING
    assert (found["balanced"], shown["balanced"], shown["lost"], found["posted"]) == (True, True, 0, {"waiting": 0})
    assert (shown["node"], shown["service"], shown["state"]) == ("capture-0", "capture", "running")
    assert 0 <= shown["heartbeat_age"] < 60
    assert found["unattributed"] == shown["others"] == {"dead_lettered": 0, "corrupt": 0, "expired": 0}
    assert len(await api.stored("", 50)) == 50


async def test_what_waits_in_the_journal_is_counted_there(api: Api, settings: Settings, ingest: Ingest) -> None:
    with a_node(settings) as node:
        node.flows(5)
        node.beat()
        await settled(api, node)
        await ingest.stop()
        node.flows(7)
        node.others()
        shown = account(await api.get(PATH))
        # The last heartbeat told of 5: what waits is known all the same, and nothing seems lost.
        assert (shown["captured"], shown["stored"], shown["waiting"]) == (15, 5, 10)
        assert shown["balanced"]
        await ingest.start()
        node.beat()
        assert account(await settled(api, node))["stored"] == 15


async def test_a_damaged_record_is_corrupt(api: Api, settings: Settings, ingest: Ingest) -> None:
    await ingest.stop()
    with a_node(settings) as node:
        node.flows(9)
        node.beat()
        (segment,) = node.segments()
        size = segment.stat().st_size
        with segment.open("r+b") as file:
            file.seek(size * 4 // 9 + 60)
            file.write(b"\xff\x00\xff")
        await ingest.start()
        shown = account(await settled(api, node))
    assert (shown["stored"], figures(shown)) == (8, NOTHING | {"corrupt": 1})
    assert (shown["balanced"], shown["lost"]) == (True, 1)


async def test_damage_to_what_ends_nothing_is_no_loss(api: Api, settings: Settings, ingest: Ingest) -> None:
    await ingest.stop()
    with a_node(settings) as node:
        chunk = events.BodyChunk(
            **node.identity(terminal=False), flow_id=ids.new_id(), side="request", index=0, data=bytes(99)
        )
        node.journal.publish(chunk)
        (segment,) = node.segments()
        with segment.open("r+b") as file:
            file.seek(60)
            file.write(b"\xff")
        node.flows(3)
        node.beat()
        await ingest.start()
        shown = account(await settled(api, node))
    assert (shown["stored"], figures(shown)) == (3, NOTHING)
    assert shown["others"] == {"dead_lettered": 0, "corrupt": 1, "expired": 0}


async def test_dead_letters(api: Api, settings: Settings, ingest: Ingest) -> None:
    """One whose origin can be read, one that is no event at all but has a number, and one without."""
    with a_node(settings) as node:
        node.flows(4)
        node.journal.publish(a_completed_flow(**node.identity() | {"time_us": 1 << 62}))
        journal = node.journal
        for value, terminal in ((b"\xc1 no event", True), (b"\xc1 nothing", False)):
            identity = node.identity(terminal=terminal)
            assert journal.append(FLOWS.name, b"key", value, identity["seq"])
        node.beat()
        found = await settled(api, node)
    shown = account(found)
    assert (shown["stored"], figures(shown)) == (4, NOTHING | {"dead_lettered": 2})
    assert shown["others"] == {"dead_lettered": 1, "corrupt": 0, "expired": 0}
    assert (found["balanced"], shown["lost"], ingest.letters) == (True, 0, 3)


async def test_drops_at_the_cap_over_a_restart(api: Api, settings: Settings, ingest: Ingest) -> None:
    await ingest.stop()
    for life in range(2):
        with a_node(settings, cap_bytes=200_000 * (life + 1)) as node:
            node.asked = node.journal.last_seq
            node.flows(30, size=20_000)
            dropped = node.journal.dropped_terminal
            assert dropped > 10 * (life + 1)
            node.journal.cap_bytes *= 10
            node.beat()
    await ingest.start()
    shown = account(await settled(api, node))
    assert (shown["captured"], shown["stored"]) == (60, 60 - dropped)
    assert (figures(shown), shown["lost"]) == (NOTHING | {"dropped": {"cap": dropped}}, dropped)


async def test_removed_segments_are_expired(api: Api, settings: Settings, ingest: Ingest) -> None:
    await ingest.stop()
    for _ in range(3):
        with a_node(settings) as node:
            node.asked = node.journal.last_seq
            node.flows(4)
            node.beat()
    node.segments()[0].unlink()
    waiting = (await api.get(PATH))["nodes"]
    assert waiting == [], "nothing was stored, so no node is known"
    await ingest.start()
    shown = account(await settled(api, node))
    assert (shown["stored"], figures(shown)) == (8, NOTHING | {"expired": 4})


async def test_a_record_that_vanishes_is_unexplained(api: Api, settings: Settings, ingest: Ingest) -> None:
    with a_node(settings) as node:
        node.flows(3)
        node.identity()  # a number is given, and nothing written
        node.flows(2)
        node.beat()
        found = await settled(api, node)
    shown = account(found)
    assert (shown["stored"], figures(shown)) == (5, NOTHING | {"unexplained": 1})
    assert (found["balanced"], shown["balanced"], found["total"]["lost"]) == (False, False, 1)


async def test_what_is_stored_twice_does_not_balance_what_is_lost(api: Api, settings: Settings, ingest: Ingest) -> None:
    with a_node(settings) as node:
        node.flows(3)
        node.beat()
        await settled(api, node)
    with psycopg.connect(conninfo(settings.common.database_url), autocommit=True) as connection:
        connection.execute("UPDATE accounting SET value = value + 1 WHERE kind = 'stored'")
    found = await api.get(PATH)
    assert (account(found)["unexplained"], found["balanced"], found["total"]["lost"]) == (-1, False, 0)


async def test_an_old_heartbeat_is_no_loss(api: Api, settings: Settings, ingest: Ingest) -> None:
    """Records are stored and others dropped after it: the next one tells."""
    with a_node(settings, cap_bytes=1 << 20) as node:
        node.flows(2)
        node.beat()
        await settled(api, node)
        node.journal.cap_bytes = 0
        node.flows(3)
        node.journal.cap_bytes = 1 << 20
        node.flows(1)

        async def stored() -> dict[str, Any]:
            shown = account(await api.get(PATH))
            return shown if shown["stored"] == 3 else {}

        shown = await eventually(stored, "three stored")
        assert figures(shown) == NOTHING | {"since_heartbeat": 3}
        assert (shown["captured"], shown["balanced"], shown["exact"], shown["lost"]) == (6, True, False, 0)
        node.beat()
        assert figures(account(await settled(api, node))) == NOTHING | {"dropped": {"cap": 3}}


async def test_a_node_on_another_machine(api: Api, settings: Settings, ingest: Ingest, tmp_path: Path) -> None:
    """Its records come over HTTP: its journal cannot be seen from here, so its heartbeat says what waits there."""
    elsewhere = DataDir(tmp_path / "elsewhere")
    node = Node(elsewhere)
    node.flows(3)
    node.beat()  # nobody has read the journal yet

    async def post(*skipped: int) -> None:
        records = []
        for topic in (FLOWS.name, "megido.nodes"):
            records += [(topic, record.key, record.value) for record in node.journal.read_back(topic)]
        body = msgspec.msgpack.encode([one for place, one in enumerate(records) if place not in skipped])
        answer = await api.client.post(
            "/proxy/api/events/", content=body, headers={"Content-Type": "application/msgpack"}
        )
        assert answer.status_code == 200, answer.text

    async def known(stored: int, told: int) -> dict[str, Any]:
        async def there() -> dict[str, Any]:
            found = await api.get(PATH)
            shown = account(found) if found["nodes"] else {"stored": 0, "captured": 0}
            done = (shown["stored"], shown["captured"]) == (stored, told) and not found["posted"]["waiting"]
            return shown if done else {}

        return await eventually(there, f"{stored} stored of {told}")

    await post(1)
    shown = await known(2, 3)
    assert figures(shown) == NOTHING | {"waiting": 1} and not shown["exact"]
    handed_on = node.journal.figures() | {"journal_waiting": 0}
    status = NodeStatus(**node.identity(terminal=False), state="running", counters=handed_on, captured=3)
    await api.publish(status)

    async def told() -> dict[str, Any]:
        shown = account(await api.get(PATH))
        return shown if shown["exact"] else {}

    assert figures(await eventually(told, "the heartbeat")) == NOTHING | {"unexplained": 1}
    await post()
    assert figures(await known(3, 3)) == NOTHING
    await asyncio.to_thread(node.journal.close)


async def test_unknown_parameters_are_refused(api: Api) -> None:
    await api.get(PATH, status=400, nodes=1)
