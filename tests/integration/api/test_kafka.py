"""The API over a real Kafka: posts reach the topics, rules reach the compacted one, readiness is true."""

import dataclasses
import uuid
from pathlib import Path
from typing import Any

import pytest
from scripts.kafka import Node

from megido_api.settings import Settings
from megido_shared.bus.open import open_bus
from megido_shared.bus.topics import TOPICS
from megido_shared.config import decode_snapshot
from megido_shared.settings import Common
from tests.integration.api.harness import Ingest, eventually, running

pytestmark = pytest.mark.kafka


async def test_posts_and_rules(fresh_kafka: Node, settings: Settings, tmp_path: Path) -> None:
    common: Common = dataclasses.replace(settings.common, kafka=fresh_kafka.bootstrap)
    bus = open_bus(common)
    await bus.create_topics(TOPICS)
    ingest = Ingest(bus, common.database_url)
    await ingest.start()
    try:
        async with running(dataclasses.replace(settings, common=common), bus) as api:
            marker = uuid.uuid4().hex
            request = {"url": f"http://h/{marker}", "method": "GET", "host": "h", "port": 80}
            number = (await api.post("/proxy/api/requests/", request))["id"]
            await api.post("/proxy/api/responses/", {"request": number, "status_code": 200})
            rule = {
                "name": marker,
                "target_url_pattern": ".",
                "injection_type": "param",
                "injection_point": "p",
                "payload_content": "v",
            }
            await api.post("/interceptor/api/payload-rules/", rule)
            (stored,) = await api.stored(marker)
            assert stored["id"] == number

            async def published() -> Any:
                raw = await bus.get_config("global")
                return raw and [one for one in decode_snapshot(raw).rules if one.name == marker]

            assert await eventually(published, "the rule on the compacted topic")
            assert (await api.client.get("/readyz")).text == "ready\n"
    finally:
        await ingest.stop()
        await bus.close()
