"""`megido migrate`: the schema and the topics, by one command."""

import asyncio
import logging
import os

from megido.terminal import write
from megido_shared.bus.open import open_bus
from megido_shared.bus.topics import TOPICS
from megido_shared.db import migrate as schema
from megido_shared.db.connect import hide_password
from megido_shared.db.embedded import EmbeddedPostgres, in_use
from megido_shared.db.embedded import database_url as embedded_url
from megido_shared.settings import Common, common_from_env


def migrate(*, data_dir: str = "", database_url: str = "", kafka: str = "") -> int:
    """Both are idempotent. Raises Unavailable, ConfigurationError."""
    common = common_from_env(os.environ, data_dir=data_dir, kafka=kafka, database_url=database_url)
    if common.database_url:
        write(migrate_schema(common.database_url))
    elif in_use(common.data_dir):
        write(migrate_schema(embedded_url(common.data_dir)))
    else:
        server = EmbeddedPostgres(common.data_dir)
        try:
            write(migrate_schema(server.start()))
        finally:
            server.stop()
    write(create_topics(common))
    return 0


def migrate_schema(url: str) -> str:
    """Says what it did."""
    before = schema.revision(url)
    schema.migrate(url)
    after = schema.revision(url)
    where = hide_password(url)
    return (
        f"schema at {after}, up to date: {where}"
        if before == after
        else f"schema {before or 'none'} → {after}: {where}"
    )


def create_topics(common: Common) -> str:
    """Says what it did. Raises Unavailable, ConfigurationError, which say all that the Kafka client would log."""
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    created = asyncio.run(_create(common))
    where = f"Kafka at {common.kafka}" if common.kafka else f"the local bus in {common.data_dir.bus}"
    if not created:
        return f"topics up to date ({len(TOPICS)}) on {where}"
    return f"topics created on {where}: {', '.join(created)}"


async def _create(common: Common) -> list[str]:
    bus = open_bus(common)
    try:
        return await bus.create_topics(TOPICS)
    finally:
        await bus.close()
