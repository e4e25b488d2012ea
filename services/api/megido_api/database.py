"""How endpoints reach Postgres: bounded in time, with one error for "away"."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from psycopg import errors as pg
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from megido_api.problems import Problem, unavailable

_GRACE_S = 1.0

type Work[T] = Callable[[AsyncConnection], Awaitable[T]]


class Database:
    """Runs pieces of work on connections of an engine whose sessions have a `statement_timeout`.

    A connection must be there within `connect_s`, the work done within the statement's timeout and a second.
    The work is a task of its own that is left behind when it is late, because cancelling psycopg waits for the
    server (psycopg #1371), and a stopped server never answers.
    """

    def __init__(self, engine: AsyncEngine, *, connect_s: float, statement_s: float) -> None:
        self.engine = engine
        self._connect_s = connect_s
        self._statement_s = statement_s
        self._left_behind: set[asyncio.Task[Any]] = set()

    async def read[T](self, work: Work[T]) -> T:
        """Each statement sees what is committed when it starts. Raises Problem (503) when Postgres is away or a
        statement takes too long."""

        async def reading(connection: AsyncConnection) -> T:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            return await work(connection)

        return await self._bounded(reading)

    async def write[T](self, work: Work[T]) -> T:
        """One transaction, rolled back as a whole when `work` raises. Raises Problem (503) as `read` does; then
        it may have been committed all the same."""

        async def writing(connection: AsyncConnection) -> T:
            async with connection.begin():
                return await work(connection)

        return await self._bounded(writing)

    async def check(self) -> None:
        """Returns when Postgres answers and holds our tables; raises Problem (503) with the reason."""
        query = text("SELECT to_regclass('flows') IS NOT NULL AND to_regclass('outbox') IS NOT NULL")
        if not await self.read(lambda connection: connection.scalar(query)):
            raise _not_migrated()

    async def _bounded[T](self, work: Work[T]) -> T:
        connected = asyncio.Event()
        task = asyncio.create_task(self._run(work, connected))
        waiter = asyncio.create_task(connected.wait())
        try:
            await asyncio.wait({task, waiter}, timeout=self._connect_s, return_when=asyncio.FIRST_COMPLETED)
            if connected.is_set() and not task.done():
                await asyncio.wait({task}, timeout=self._statement_s + _GRACE_S)
        finally:
            waiter.cancel()
            if not task.done():
                self._leave_behind(task)
        if not task.done():
            raise unavailable("Postgres does not answer")
        return task.result()

    async def _run[T](self, work: Work[T], connected: asyncio.Event) -> T:
        try:
            async with self.engine.connect() as connection:
                connected.set()
                return await work(connection)
        except PoolTimeout as error:
            raise unavailable("all connections to Postgres are in use", "busy") from error
        except DBAPIError as error:
            raise _translated(error) from error

    def _leave_behind(self, task: asyncio.Task[Any]) -> None:
        self._left_behind.add(task)
        task.add_done_callback(self._forget)
        task.cancel()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()  # seen: nobody waits for it any more

    async def close(self, timeout: float) -> None:
        """Gives up after `timeout` seconds when the server does not answer."""
        with suppress(TimeoutError, SQLAlchemyError):
            async with asyncio.timeout(timeout):
                await self.engine.dispose()


def _translated(error: DBAPIError) -> Exception:
    match error.orig:
        case pg.QueryCanceled():
            return unavailable("the query took too long; narrow it", "query_timeout")
        case pg.UndefinedTable() | pg.UndefinedColumn():
            return _not_migrated()
        case pg.OperationalError() | pg.InterfaceError():
            return unavailable("Postgres is away")
        case _:
            return error


def _not_migrated() -> Problem:
    return unavailable("the database is not up to date: run megido migrate", "not_migrated")
