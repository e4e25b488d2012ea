"""One change, by the command line, reaches every node of a history: on the local bus and on Kafka."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripts.kafka import Node as KafkaNode

from tests.integration.api.processes import api, free_port, service
from tests.integration.capture.harness import DEADLINE, Proxy, capture, curl, run
from tests.integration.capture.upstream import Upstream, serving

RULE = {
    "name": "mark",
    "target_url_pattern": "/echo",
    "injection_type": "header",
    "injection_point": "X-Mark",
    "payload_content": "m",
}


@dataclass
class Line:
    """API, ingest and two proxies."""

    url: str
    proxies: list[Proxy]
    logs: Path

    async def megido(self, *arguments: str, code: int = 0) -> str:
        found, printed = await run(sys.executable, "-m", "megido", *arguments, "--api-url", self.url)
        assert found == code, printed
        return printed

    async def config(self, *assignments: str) -> int:
        """Changes the configuration; the version that it then has."""
        printed = await self.megido("config", "set", *assignments, "--json")
        return int(json.loads(printed)["version"])

    async def until_applied(self, version: int) -> list[dict[str, Any]]:
        return await self.nodes(lambda found: all(node["config_version"] >= version for node in found))

    async def nodes(self, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """What `megido nodes` says of the two proxies, once it is `enough`."""
        async with asyncio.timeout(DEADLINE * 2):
            while True:
                async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
                    found = (await client.get("/proxy/api/nodes/?alive=true&service=capture")).json()["nodes"]
                if len(found) == 2 and enough(found):
                    return list(found)
                await asyncio.sleep(0.05)

    async def post(self, path: str, document: Any) -> Any:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            answer = await client.post(path, json=document)
            assert answer.is_success, answer.text
            return answer.json()


@pytest.fixture(params=["local", pytest.param("kafka", marks=pytest.mark.kafka)])
async def line(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> AsyncIterator[Line]:
    kafka: list[str] = []
    if request.param == "kafka":
        broker: KafkaNode = request.getfixturevalue("fresh_kafka")
        kafka = ["--kafka", broker.bootstrap]
        found, printed = await run(sys.executable, "-m", "megido", "migrate", "--database-url", database, *kafka)
        assert found == 0, printed
    with ExitStack() as stack:
        server, port = stack.enter_context(api(database, tmp_path, *kafka))
        metrics = free_port()
        common = ["--data-dir", str(tmp_path / "data"), "--database-url", database, *kafka]
        more = ["--metrics-port", str(metrics), "--log-dir", str(tmp_path / "logs")]
        ingest = stack.enter_context(service("megido_ingest", *common, *more, log=tmp_path / "ingest.log"))
        await asyncio.to_thread(ingest.wait_ready, metrics)
        await asyncio.to_thread(server.wait_ready, port)
        async with AsyncExitStack() as proxies:
            # On Kafka each has a machine of its own; the local bus is one directory.
            places = [tmp_path / ("data" if not kafka else f"data-{name}") for name in ("one", "two")]
            started = [
                await proxies.enter_async_context(
                    capture(place, "--node-name", name, *kafka, *(["--forwarder"] if kafka else []))
                )
                for place, name in zip(places, ("one", "two"), strict=True)
            ]
            yield Line(f"http://127.0.0.1:{port}", started, tmp_path / "logs")


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with serving() as found:
        yield found


@pytest.mark.timeout(300)
async def test_every_node_applies_a_change(line: Line, upstream: Upstream) -> None:
    await line.nodes(lambda found: True)
    echo = f"http://127.0.0.1:{upstream.port}/echo"

    # Settings: both proxies ask for the password as soon as they say that they apply it.
    version = await line.config("auth_enabled=on", "auth_username=ann", "auth_password=s3cret-word")
    await line.until_applied(version)
    for proxy in line.proxies:
        assert (await curl(proxy, echo)).status == 407
        assert (await curl(proxy, echo, "--proxy-user", "ann:s3cret-word")).status == 200
    version = await line.config("auth_enabled=off", "max_body_size=5")
    await line.until_applied(version)
    for proxy in line.proxies:
        assert (await curl(proxy, echo)).status == 200

    # One node alone.
    printed = await line.megido("config", "set", "ip_blacklist=127.0.0.1", "--scope", "node:two-0", "--json")
    alone = int(json.loads(printed)["version"])
    await line.nodes(
        lambda found: {n["node"]: n["config_version"] for n in found} == {"one-0": version, "two-0": alone}
    )
    one, two = line.proxies
    assert (await curl(one, echo)).status == 200 and (await curl(two, echo)).status != 200
    await line.megido("config", "unset", "ip_blacklist", "--scope", "node:two-0")

    # Rules, and their hits: two on each proxy.
    rule = (await line.post("/interceptor/api/payload-rules/", RULE))["id"]
    [newest] = json.loads("[" + await line.megido("config", "history", "--limit", "1", "--json") + "]")
    await line.until_applied(newest["version"])
    for proxy in [*line.proxies, *line.proxies]:
        assert b"X-Mark: m" in (await curl(proxy, echo)).body

    async def hits() -> int:
        shown = [json.loads(row) for row in (await line.megido("rules", "list", "--json")).splitlines()]
        return next(int(found["hits"]) for found in shown if found["id"] == rule)

    async with asyncio.timeout(DEADLINE * 2):
        while (found := await hits()) < 4:
            await asyncio.sleep(0.1)
    assert found == 4

    # What no proxy could apply is one line, and changes nothing.
    printed = await line.megido("config", "set", "ip_whitelist=10.0.0.0/8, nonsense", code=1)
    [refused] = printed.splitlines()
    assert refused.startswith("megido: ip_whitelist: 'nonsense' is no address or network")
    shown = await line.megido("config", "show")
    assert "max_body_size" in shown and "s3cret" not in shown
    table = await line.megido("nodes")
    assert "one-0" in table and "two-0" in table
    printed = await line.megido("config", "history")
    assert "auth_password: – → changed" in printed and "s3cret" not in printed

    # JSON logs move.
    await line.config("log_directory=team")
    async with asyncio.timeout(DEADLINE):
        while not (line.logs / "team").is_dir():
            await asyncio.sleep(0.05)
