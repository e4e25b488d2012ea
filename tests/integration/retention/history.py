"""A history of several days, stored by the real ingest, and what is left of it."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from megido_ingest.retention import Places, Retention
from megido_shared import events, ids
from megido_shared.clock import SystemClock
from megido_shared.db.connect import conninfo
from megido_shared.retention import Policy, Report
from megido_shared.retention.report import from_json
from megido_shared.testing import a_completed_flow, a_request, a_response
from megido_shared.testing.builders import EPOCH
from tests.integration.ingest.support import Log, ingest, rows, stream
from tests.integration.ingest.traffic import an_event

TABLES = ("flows", "bodies", "body_chunks", "websocket_messages", "errors", "auth_attempts")
SHARED = b"the same in every flow " * 20


def moment(days_ago: float) -> datetime:
    """Noon of a day before today."""
    today = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
    return today - timedelta(days=days_ago)


def an_id(when: datetime) -> bytes:
    """A UUIDv7 of that time."""
    ms = int(when.timestamp() * 1000)
    return ms.to_bytes(6, "big") + ids.new_id()[6:]


@dataclass
class History:
    """Stores a few flows, messages, errors and attempts a day, and remembers their ids by day."""

    url: str
    flows: dict[int, list[uuid.UUID]] = field(default_factory=dict)
    seq: int = 0
    log: Log = field(default_factory=lambda: Log(stream()))

    async def day(self, days_ago: int, flows: int = 3, body: bytes = b"") -> None:
        when = moment(days_ago)
        made: list[events.AnyEvent | bytes] = []
        for number in range(flows):
            flow_id = an_id(when)
            self.flows.setdefault(days_ago, []).append(ids.to_uuid(flow_id))
            own = body or b"only of %d/%d" % (days_ago, number)
            common: dict[str, Any] = {"flow_id": flow_id, "time_us": int(when.timestamp() * 1e6)}
            request = a_request(body=events.Body(data=SHARED, size=len(SHARED)))
            made.append(
                a_completed_flow(
                    **common, seq=self._next(), request=request,
                    response=a_response(body=events.Body(data=own, size=len(own))),
                )
            )  # fmt: skip
            made.append(self._message(when, flow_id))
        failure = events.Failure(events.ErrorType.TIMEOUT, "too slow")
        failed = an_id(when)
        made += [
            an_event(events.FlowFailed, flow_id=failed, request=a_request(), seq=self._next(), failure=failure),
            an_event(events.ErrorRaised, error_id=an_id(when), failure=failure, seq=self._next()),
            an_event(events.AuthAttempted, auth_id=an_id(when), success=False, seq=self._next()),
            an_event(events.BodyChunk, flow_id=an_id(when), side="response", index=0, data=b"an orphan"),
        ]
        self.flows[days_ago].append(ids.to_uuid(failed))
        await ingest(self.url, [self.log.add(*made)])

    def _message(self, when: datetime, flow_id: bytes) -> Any:
        return an_event(
            events.WebSocketMessage, message_id=an_id(when), flow_id=flow_id, seq=self._next(),
            connection_id=ids.connection_id(flow_id), url="wss://x/", direction="SEND", message_type="TEXT",
            payload=b"hello", size=5,
        )  # fmt: skip

    async def message(self, days_ago: int, flow_id: uuid.UUID) -> None:
        """A message of a flow of another day."""
        await ingest(self.url, [self.log.add(self._message(moment(days_ago), flow_id.bytes))])

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def pin(self, *flow_ids: uuid.UUID) -> None:
        execute(self.url, "INSERT INTO flow_pins SELECT unnest(%s::uuid[]), 'test', now()", [list(flow_ids)])

    def age_the_rest(self, days_ago: int) -> None:
        """As if everything of tables without days had come then."""
        when = moment(days_ago)
        execute(self.url, "UPDATE feed SET committed_at = %s", [when])
        execute(
            self.url,
            "INSERT INTO posted_requests SELECT n, gen_random_uuid(), '', %s FROM generate_series(1, 3) AS n",
            [when],
        )
        execute(
            self.url,
            'INSERT INTO dead_letters (source_id, topic, partition, "offset", event_type, reason, key, value, state,'
            " created_at) SELECT 's', 't', 0, n, '', 'bad', '', '', CASE n WHEN 1 THEN 'queued' ELSE 'new' END, %s"
            " FROM generate_series(1, 4) AS n",
            [when],
        )

    def days_of(self, table: str = "flows") -> dict[int, int]:
        """Rows by how many days ago they are of."""
        key = {"websocket_messages": "message_id", "errors": "error_id", "auth_attempts": "auth_id"}
        column = key.get(table, "flow_id")
        if table == "bodies":
            query = "SELECT (now() AT TIME ZONE 'UTC')::date - day, count(*) FROM bodies GROUP BY 1"
        else:
            query = (
                "SELECT (now() AT TIME ZONE 'UTC')::date - to_timestamp(('x' || lpad(left(replace("
                f"{column}::text, '-', ''), 12), 16, '0'))::bit(64)::bigint / 1000.0)::date, count(*)"
                f" FROM {table} GROUP BY 1"
            )
        return dict(_utc(self.url, query))


def _utc(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo(url), options="-c timezone=UTC") as connection:
        return connection.execute(query).fetchall()


def execute(url: str, query: str, values: list[Any] | None = None) -> None:
    with psycopg.connect(conninfo(url), autocommit=True) as connection:
        connection.execute(query, values)


def set_policy(url: str, **fields: int) -> None:
    policy = Policy(**fields)
    execute(
        url,
        "INSERT INTO retention_policy VALUES (true, %s, %s, %s, %s, %s, 'test', now()) ON CONFLICT (only_row)"
        " DO UPDATE SET days = excluded.days, max_bytes = excluded.max_bytes, log_days = excluded.log_days,"
        " log_max_bytes = excluded.log_max_bytes, every_minutes = excluded.every_minutes",
        [policy.days, policy.max_bytes, policy.log_days, policy.log_max_bytes, policy.every_minutes],
    )


def ask(url: str, *, dry: bool) -> int:
    return int(
        rows(
            url,
            "INSERT INTO retention_runs (state, dry_run, requested_by, requested_at, report, error)"
            " VALUES ('queued', %s, 'test', now(), '{}', '') RETURNING id",
            [dry],
        )[0][0]
    )


def noted(url: str, run: int) -> tuple[str, Report]:
    state, report = rows(url, "SELECT state, report FROM retention_runs WHERE id = %s", [run])[0]
    return state, from_json(report)


@asynccontextmanager
async def retention(url: str, places: Places | Path) -> AsyncIterator[Retention]:
    wanted = places if isinstance(places, Places) else Places(places)
    async with Retention.opened(url, wanted, SystemClock()) as found:
        assert found is not None, "another run is under way"
        yield found


async def run_once(url: str, places: Places | Path, *, dry: bool = False) -> Report:
    async with retention(url, places) as found:
        return await found.asked(ask(url, dry=dry), dry=dry)


__all__ = ["EPOCH", "TABLES", "History", "ask", "execute", "moment", "noted", "retention", "run_once", "set_policy"]
