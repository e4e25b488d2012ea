"""What background work does while its database is away, and between its rounds."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psycopg
from sqlalchemy.exc import SQLAlchemyError


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """For `seconds`; a stop cuts it short."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def serve_again(
    serve: Callable[[asyncio.Event], Awaitable[None]],
    stop: asyncio.Event,
    *,
    what: str,
    every_s: float,
    log: logging.Logger,
) -> None:
    """Calls `serve` until `stop`, `every_s` after it failed for what a database or a disk does. Says the first of
    several failures in a row, by `what` waits; anything else is raised."""
    complained = False
    while not stop.is_set():
        try:
            await serve(stop)
            complained = False
        except (OSError, psycopg.Error, SQLAlchemyError) as error:
            if not complained:
                log.warning("%s waits: %s", what, (str(error).strip().splitlines() or ["?"])[0])
            complained = True
            await pause(stop, every_s)
