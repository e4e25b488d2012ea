"""A writer at work, and what it has written."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from megido_ingest.jsonlogs import JsonLogWriter, LogLayout
from tests.integration.jsonlogs.rows import Store


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def writing(store: Store, root: Path, layout: LogLayout = "tree") -> AsyncIterator[JsonLogWriter]:
    writer = JsonLogWriter(store.url, root, layout)
    stop = asyncio.Event()
    task = asyncio.create_task(writer.run(stop))
    try:
        yield writer
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


async def write_all(store: Store, root: Path, layout: LogLayout = "tree") -> None:
    """Everything that is in the feed now."""
    async with writing(store, root, layout) as writer:
        last = store.last_seq()
        await until(lambda: writer.position >= last)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
