"""The bus on Apache Kafka."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    NoError,
    PolicyViolationError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)

from megido_shared.bus import base
from megido_shared.bus.base import Backlog, Outgoing, Resume, Revoked, Stream
from megido_shared.bus.kafka.backlog import backlog
from megido_shared.bus.kafka.client import CONNECT_SECONDS, client_options, ended, quieten, within
from megido_shared.bus.kafka.config import ConfigTopic
from megido_shared.bus.kafka.consumer import KafkaConsumer
from megido_shared.bus.kafka.producer import APPEND_SECONDS, KafkaProducer
from megido_shared.bus.topics import CONFIG, INGESTED, Topic
from megido_shared.errors import ConfigurationError, Unavailable

ADMIN_SECONDS = 20.0
KNOWN_SECONDS = 10.0
"""How long one broker may not know a topic that another has confirmed."""
PREFIX = re.compile(r"[A-Za-z0-9._-]{1,60}")
_REFUSED = (
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    PolicyViolationError,
    TopicAuthorizationFailedError,
)


class KafkaBus:
    """Connections are made when they are needed: a broker that is away is an Unavailable, not a failed start."""

    def __init__(
        self,
        bootstrap: str,
        *,
        security: Mapping[str, str] | None = None,
        append_seconds: float = APPEND_SECONDS,
        prefix: str = "",
    ) -> None:
        """`bootstrap` is host:port[,host:port…]; `security` as of `client.security_from_env`; `append_seconds` the
        deadline of an append; `prefix` stands before the names of topics and groups in Kafka, so that deployments can
        share one, and nowhere else. Raises ConfigurationError on settings that cannot work."""
        if prefix and not PREFIX.fullmatch(prefix):
            raise ConfigurationError(f"MEGIDO_KAFKA_PREFIX cannot be {prefix!r}; use letters, digits, . _ and -")
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._options: dict[str, Any] = client_options(bootstrap, security or {})
        self._append_seconds = append_seconds
        self._confirmed: set[str] = set()
        self._config = ConfigTopic(self._options, prefix)
        self._config_producer = KafkaProducer(self._options, deadline=append_seconds, prefix=prefix)
        quieten()

    async def create_topics(self, topics: Sequence[Topic]) -> list[str]:
        async with self._admin() as admin:
            existing = await _names(admin)
            named = {self._prefix + topic.name: topic for topic in topics}
            missing = {name: topic for name, topic in named.items() if name not in existing}
            if not missing:
                self._confirmed.update(topic.name for topic in topics)
                return []
            brokers = (await within(ADMIN_SECONDS, admin.describe_cluster(), "asking for the brokers"))["brokers"]
            replication = 3 if len(brokers) >= 3 else 1
            wanted = [
                NewTopic(name, topic.partitions, replication, topic_configs=topic.config(replication))
                for name, topic in missing.items()
            ]
            answer = await within(ADMIN_SECONDS, admin.create_topics(wanted), "creating topics")
            created = [name for name, code, message, *_ in answer.topic_errors if _created(name, code, message)]
            await within(ADMIN_SECONDS, _until_known(admin, set(missing)), "creating topics")
            self._confirmed.update(topic.name for topic in topics)
            return [named[name].name for name in created]

    async def topics(self) -> frozenset[str]:
        async with self._admin() as admin:
            ours = (name for name in await _names(admin) if name.startswith(self._prefix) and not name.startswith("__"))
            return frozenset(name.removeprefix(self._prefix) for name in ours)

    async def producer(self, name: str, *, ordered: bool = False) -> base.Producer:
        return KafkaProducer(self._options, deadline=self._append_seconds, ordered=ordered, prefix=self._prefix)

    async def consumer(
        self,
        group: str,
        topics: Sequence[Topic],
        *,
        resume: Resume | None = None,
        revoked: Revoked | None = None,
        pins: bool = False,
    ) -> base.Consumer:
        """Raises Unavailable without a broker, ConfigurationError when a topic does not exist. One that
        `create_topics` has confirmed is waited for: the next broker asked may not know of it yet."""
        names = {topic.name for topic in topics}
        if missing := await self._missing(names):
            raise ConfigurationError(
                f"Kafka at {self._bootstrap} has no topic {self._prefix}{missing[0]}; run `megido migrate`"
            )
        member = KafkaConsumer(
            self._options,
            self._prefix + group,
            names,
            prefix=self._prefix,
            source_id=self.source_id,
            resume=resume,
            revoked=revoked,
        )
        await member.start()
        return member

    async def _missing(self, names: set[str]) -> list[str]:
        deadline = time.monotonic() + KNOWN_SECONDS
        while missing := names - await self.topics():
            if not missing <= self._confirmed or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        return sorted(missing)

    async def put_config(self, scope: str, value: bytes) -> None:
        await self._config_producer.append([Outgoing(CONFIG.name, scope.encode(), value)])

    async def get_config(self, scope: str) -> bytes | None:
        return await self._config.get(scope)

    async def get_configs(self) -> Mapping[str, bytes]:
        return await self._config.all()

    def watch_config(self, scopes: Collection[str]) -> AsyncIterator[tuple[str, bytes]]:
        return self._config.watch(scopes)

    async def backlog(self, positions: Mapping[Stream, int], *, read_bytes: int) -> Mapping[Stream, Backlog]:
        """By offsets alone: the records of one node lie among those of all others."""
        async with self._admin() as admin:
            wanted = {self._prefix + topic.name: topic.name for topic in INGESTED}
            existing = sorted(wanted.keys() & await _names(admin))
            described = await within(ADMIN_SECONDS, admin.describe_topics(existing), "asking for the partitions")
        partitions = {
            TopicPartition(one["topic"], part["partition"]): wanted[one["topic"]]
            for one in (described if existing else ())
            for part in one["partitions"]
        }
        return await backlog(self._options, await self.source_id(), partitions, positions)

    async def ping(self) -> None:
        await self.cluster_id()

    async def cluster_id(self) -> str:
        """The id that this cluster was formatted with. Raises Unavailable."""
        async with self._admin() as admin:
            described = await within(ADMIN_SECONDS, admin.describe_cluster(), "asking for the cluster")
            found: str = described["cluster_id"] or ""
            return found

    async def source_id(self) -> str:
        """What tells the streams of this deployment from all others."""
        return await self.cluster_id() + (f"/{self._prefix}" if self._prefix else "")

    async def close(self) -> None:
        await self._config_producer.close()

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(**self._options)
        try:
            await within(CONNECT_SECONDS, admin.start(), f"connecting to {self._bootstrap}")
            yield admin
        finally:
            await ended(admin.close())


async def _names(admin: AIOKafkaAdminClient) -> set[str]:
    return set(await within(ADMIN_SECONDS, admin.list_topics(), "asking for the topics"))


async def _until_known(admin: AIOKafkaAdminClient, names: set[str]) -> None:
    """A topic that was just made takes a moment to reach the brokers' metadata."""
    while not names <= await _names(admin):  # noqa: ASYNC110 - the broker sends no event for it
        await asyncio.sleep(0.05)


def _created(name: str, code: int, message: str | None) -> bool:
    error = for_code(code)
    if error is NoError:
        return True
    if error is TopicAlreadyExistsError:
        return False
    text = f"Kafka did not create topic {name}: {message or error.__name__}"
    raise ConfigurationError(text) if issubclass(error, _REFUSED) else Unavailable(text)
