"""The bus without Kafka: durable logs on disk that the processes of one machine share."""

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

from megido_shared.bus import base
from megido_shared.bus.base import BEHIND_A_FAILURE, Backlog, Outgoing, Resume, Revoked, Stream
from megido_shared.bus.local.backlog import backlog
from megido_shared.bus.local.config import ConfigFiles
from megido_shared.bus.local.consumer import LocalConsumer
from megido_shared.bus.local.files import make_dir
from megido_shared.bus.local.groups import Group
from megido_shared.bus.local.journal import Journal
from megido_shared.bus.local.locks import open_lock_file
from megido_shared.bus.local.segments import TOPIC
from megido_shared.bus.topics import Topic
from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError, Unavailable


class LocalProducer:
    """Appends through a journal of its own."""

    def __init__(self, journal: Journal, *, ordered: bool = False) -> None:
        self.journal = journal
        self._ordered = ordered
        self._failed = False

    async def append(self, records: Sequence[Outgoing]) -> None:
        for record in records:
            if self._failed and self._ordered:
                raise Unavailable(BEHIND_A_FAILURE)
            if not self.journal.append(record.topic, record.key, record.value):
                self._failed = True
                raise Unavailable(f"the journal of {self.journal.node} cannot take a record: {_reasons(self.journal)}")

    async def close(self) -> None:
        await asyncio.to_thread(self.journal.close)


class LocalBus:
    """Everything lies in the data directory; nothing is held open between calls."""

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._config = ConfigFiles(data_dir.config)
        self._topics = data_dir.bus / ".topics"

    async def create_topics(self, topics: Sequence[Topic]) -> list[str]:
        """Streams come into being with their first record; a topic is known by an empty file of its name."""
        try:
            make_dir(self._data_dir.ensure().bus / ".topics")
            existing = await self.topics()
            new = [topic.name for topic in topics if topic.name not in existing]
            for name in new:
                if not TOPIC.fullmatch(name):
                    raise ConfigurationError(f"a topic cannot be called {name!r}")
                os.close(open_lock_file(self._topics / name))
        except OSError as error:
            raise Unavailable(f"{self._topics}: {error.strerror}") from error
        return new

    async def topics(self) -> frozenset[str]:
        try:
            return frozenset(path.name for path in self._topics.iterdir())
        except FileNotFoundError:
            return frozenset()

    async def producer(self, name: str, *, ordered: bool = False) -> base.Producer:
        return LocalProducer(await asyncio.to_thread(Journal.open, self._data_dir, name), ordered=ordered)

    async def consumer(
        self,
        group: str,
        topics: Sequence[Topic],
        *,
        resume: Resume | None = None,
        revoked: Revoked | None = None,
        pins: bool = False,
    ) -> base.Consumer:
        names = [topic.name for topic in topics]
        try:
            make_dir(self._data_dir.ensure().bus)
            joined = Group(self._data_dir, group)
            if pins:
                joined.pin(names)
            return LocalConsumer(self._data_dir, joined, names, resume=resume, revoked=revoked, pins=pins)
        except OSError as error:
            raise Unavailable(f"group {group} in {self._data_dir.root}: {error.strerror}") from error

    async def put_config(self, scope: str, value: bytes) -> None:
        try:
            await asyncio.to_thread(self._config.put, scope, value)
        except OSError as error:
            raise Unavailable(f"configuration in {self._data_dir.config}: {error.strerror}") from error

    async def get_config(self, scope: str) -> bytes | None:
        return self._config.get(scope)

    async def get_configs(self) -> Mapping[str, bytes]:
        return self._config.all()

    def watch_config(self, scopes: Collection[str]) -> AsyncIterator[tuple[str, bytes]]:
        return self._config.watch(scopes)

    async def backlog(self, positions: Mapping[Stream, int], *, read_bytes: int) -> Mapping[Stream, Backlog]:
        try:
            return await asyncio.to_thread(backlog, self._data_dir.bus, positions, read_bytes)
        except OSError as error:
            raise Unavailable(f"the local bus cannot be read: {error.strerror} ({error.filename})") from error

    async def ping(self) -> None:
        if not os.access(self._data_dir.root, os.R_OK | os.W_OK | os.X_OK):
            raise Unavailable(f"data directory {self._data_dir.root} cannot be read and written")

    async def close(self) -> None:
        """Producers and consumers are closed by those who opened them."""


def _reasons(journal: Journal) -> str:
    return ", ".join(f"{reason} {count} times" for reason, count in journal.drops.items())
