"""The feed's reader that writes log files. One writer a log root; nothing waits for it."""

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import TupleRow
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_ingest import failpoints
from megido_ingest.background import pause
from megido_ingest.jsonlogs import entries, feed, general
from megido_ingest.jsonlogs.layout import LogLayout, layout_of
from megido_ingest.jsonlogs.lines import HourlyLines
from megido_ingest.jsonlogs.place import Directory
from megido_shared import events
from megido_shared.db.connect import connect, create_engine
from megido_shared.db.read import StoredFlow, complete

log = logging.getLogger(__name__)

_BATCHES_AT_ONCE = 16
_POLL_SECONDS = 0.5
_NODES_EVERY = 2.0
_LAST_SECONDS = 2.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
_COMPLAIN_EVERY = 30.0


class JsonLogWriter:
    """Writes the log files of everything that the feed reports, from where it stopped last time.

    A new log root gets the whole history that the database has; a folder below it that the configuration names gets
    what comes from then on. A disk that cannot be written or a database that is away is waited for, with a line in
    the service's log at most every 30 seconds. Layout `off` writes nothing; turned on again, what was stored meanwhile
    is written.
    """

    def __init__(self, database_url: str, log_root: Path, layout: LogLayout = "tree") -> None:
        self._url = database_url
        self._layout = layout
        self._root = log_root.absolute()
        self._reader = f"json-logs:{self._root}"
        self.directory = Directory(self._root)
        self._complained = 0.0
        self._nodes_read = 0.0
        self.position = 0
        """The feed's seq up to which everything is written."""
        self._place(self._root)

    def _move_to(self, path: Path) -> None:
        self._files.close()
        self._place(path)
        if path != self._root:
            self._files.make("")

    def _place(self, path: Path) -> None:
        inside = "" if path == self._root else str(path.relative_to(self._root))
        self.directory.path = path
        self._files = layout_of(self._layout, self._root, inside)
        self._general = general.GeneralLog(self._root, inside)
        self._folders: dict[str, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. Never raises for what a disk or a database does."""
        if self._layout == "off":
            await stop.wait()
        seconds = _FIRST_PAUSE
        while not stop.is_set():
            begun = self.position
            try:
                await self._serve(stop)
            except (OSError, psycopg.Error, SQLAlchemyError) as error:
                self._complain(error)
                seconds = _FIRST_PAUSE if self.position > begun else min(seconds * 2, _LONGEST_PAUSE)
                await pause(stop, seconds)

    async def _serve(self, stop: asyncio.Event) -> None:
        engine = create_engine(self._url, application_name="megido json logs", pool_size=1, max_overflow=0)
        session = await connect(self._url, application_name="megido json logs lock")
        try:
            if not await self._only_writer(session, stop):
                return
            await session.execute("LISTEN megido_feed")
            async with engine.connect() as connection:
                self.position = await feed.position(connection, self._reader)
            await asyncio.to_thread(self._resume)
            while not stop.is_set():
                if not await self._round(engine):
                    # Ends early on a notification; otherwise this is the poll.
                    async for _ in session.notifies(timeout=_POLL_SECONDS, stop_after=1):
                        pass
            await self._catch_up(engine)
        finally:
            await session.close()
            await engine.dispose()

    def _resume(self) -> None:
        # Whatever the layout is now: an earlier start may have had the other one.
        lines = HourlyLines(self._root)
        lines.resume(self.position)
        lines.close()
        self._files.resume(self.position)

    async def _catch_up(self, engine: AsyncEngine) -> None:
        """What was stored just before the stop, nodes that say farewell included; the next start has the rest."""
        deadline = time.monotonic() + _LAST_SECONDS
        self._nodes_read = 0.0
        while await self._round(engine) and time.monotonic() < deadline:
            pass

    async def _only_writer(self, session: psycopg.AsyncConnection[TupleRow], stop: asyncio.Event) -> bool:
        """Waits for this root's lock, which is the session's: it is free again when its holder dies."""
        while not stop.is_set():
            found = await session.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [self._reader])
            row = await found.fetchone()
            if row is not None and row[0]:
                return True
            await pause(stop, _NODES_EVERY)
        return False

    async def _round(self, engine: AsyncEngine) -> bool:
        """Writes the next batches, then moves the cursor. False when there was nothing new."""
        async with engine.connect() as connection:
            await self._nodes(connection)
            batches = await feed.batches_after(connection, self.position, _BATCHES_AT_ONCE)
            if not batches:
                return False
            last = batches[-1][0]
            batch_ids = [batch_id for _, batch_id in batches]
            self._files.begin(self.position, last)
            await self._flows(connection, batch_ids)
            await self._messages(connection, batch_ids)
            await self._errors(connection, batch_ids)
            await self._auth(connection, batch_ids)
            await asyncio.to_thread(self._files.flush)
            failpoints.reach("logs_after_write")
            await feed.advance(connection, self._reader, last)
            await connection.commit()
        failpoints.reach("logs_after_commit")
        self.position = last
        await asyncio.to_thread(self._files.committed)
        return True

    async def _flows(self, connection: AsyncConnection, batches: list[int]) -> None:
        async for rows in feed.flow_rows(connection, batches):
            flows = await _readable(connection, rows)
            replayed = {flow.row.original_flow_id for flow in flows if flow.row.original_flow_id}
            originals = await feed.integer_ids(connection, replayed)
            await asyncio.to_thread(self._write_flows, flows, originals)

    def _write_flows(self, flows: Sequence[StoredFlow], originals: entries.Ids) -> None:
        for flow in flows:
            if flow.row.rank == events.Rank.STARTED and not self._files.keeps_every_state:
                continue  # it comes again when it has ended
            with _left_out("flow", flow.row):
                for entry in entries.flow_entries(flow, originals):
                    self._files.write(entry)
        self._note(general.opened_line(flow.row) for flow in flows)

    async def _messages(self, connection: AsyncConnection, batches: list[int]) -> None:
        async for rows in feed.message_rows(connection, batches):
            await asyncio.to_thread(self._write_messages, rows)

    def _write_messages(self, rows: Sequence[Row[Any]]) -> None:
        for row in rows:
            with _left_out("message", row):
                self._files.write(entries.websocket_entry(row, self._folder(row)))
        self._note(general.closed_line(row) for row in rows)

    def _folder(self, row: Row[Any]) -> str:
        name, start = entries.websocket_folder(row.connection_id, row.flow_id)
        if start is not None:
            return f"{name}_{start}"
        if name not in self._folders:
            known = self._files.folder_of("websockets", name)
            self._folders[name] = known or f"{name}_{int(row.occurred_at.timestamp())}"
        return self._folders[name]

    async def _errors(self, connection: AsyncConnection, batches: list[int]) -> None:
        rows = await feed.error_rows(connection, batches)
        if rows:
            flows = await feed.integer_ids(connection, {row.flow_id for row in rows if row.flow_id})
            await asyncio.to_thread(self._write_errors, rows, flows)

    def _write_errors(self, rows: Sequence[Row[Any]], flows: dict[uuid.UUID, int]) -> None:
        for row in rows:
            with _left_out("error", row):
                self._files.write(entries.error_entry(row, flows))
        self._note(general.error_line(row) for row in rows)

    async def _auth(self, connection: AsyncConnection, batches: list[int]) -> None:
        rows = await feed.auth_rows(connection, batches)
        if rows:
            await asyncio.to_thread(self._write_auth, rows)

    def _write_auth(self, rows: Sequence[Row[Any]]) -> None:
        for row in rows:
            with _left_out("auth attempt", row):
                self._files.write(entries.auth_entry(row))
        self._note(general.auth_line(row) for row in rows)

    async def _nodes(self, connection: AsyncConnection) -> None:
        """Heartbeats are no part of the feed (they would fill it), so nodes are looked at now and then; and so is the
        configuration."""
        now = time.monotonic()
        if now - self._nodes_read < _NODES_EVERY:
            return
        path = await self.directory.wanted(connection)
        if path != self.directory.path:
            await asyncio.to_thread(self._move_to, path)
            log.info("JSON logs go to %s from now on", path)
        rows = await feed.node_rows(connection)
        await asyncio.to_thread(self._note, [line for row in rows for line in general.node_lines(row)])
        self._nodes_read = now

    def _note(self, lines: Iterable[general.Line | None]) -> None:
        found = [line for line in lines if line is not None]
        if found:
            self._general.append(found)

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        if not self._complained or now - self._complained >= _COMPLAIN_EVERY:
            self._complained = now
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("JSON logs in %s wait, nothing else does: %s", self.directory.path, reason)


@contextmanager
def _left_out(what: str, row: Row[Any]) -> Iterator[None]:
    """A row that no file can show is named in the log and left out: it must not hold up all that come after it."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        log.error("%s %s has no JSON log: %s", what, row.id, error)


async def _readable(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[StoredFlow]:
    """The flows of rows; one that cannot be decoded is named in the log and left out, its neighbours are not."""
    try:
        return await complete(connection, rows)
    except ValueError:
        found = []
        for row in rows:
            try:
                found += await complete(connection, [row])
            except ValueError as error:
                log.error("flow %s cannot be decoded and has no JSON log: %s", row.id, error)
        return found
