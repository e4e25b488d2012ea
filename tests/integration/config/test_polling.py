"""A proxy without Kafka and without an ingest on its data directory asks the API, and reports to it."""

import asyncio
from pathlib import Path

import httpx

from tests.integration.api.processes import api, free_port, service
from tests.integration.capture.harness import DEADLINE, capture, curl
from tests.integration.capture.upstream import serving

TOKEN = "t0ken-of-the-api-" * 2


async def test_the_configuration_is_polled_with_the_token(database: str, tmp_path: Path) -> None:
    metrics = free_port()
    place = ["--data-dir", str(tmp_path / "data"), "--database-url", database]
    more = ["--metrics-port", str(metrics), "--log-dir", str(tmp_path / "logs")]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        api(database, tmp_path, env={"MEGIDO_API_TOKEN": TOKEN}) as (server, port),
        service("megido_ingest", *place, *more, log=tmp_path / "ingest.log") as ingest,
    ):
        await asyncio.to_thread(server.wait_ready, port)
        await asyncio.to_thread(ingest.wait_ready, metrics)
        url = f"http://127.0.0.1:{port}"
        options = ("--api-url", url, "--cache-ttl", "1", "--forwarder", "--source-app", "a b")
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client,
            serving() as upstream,
            capture(tmp_path / "elsewhere", *options, MEGIDO_API_TOKEN=TOKEN) as proxy,
        ):
            await client.patch("/proxy/api/config/", json={"max_body_size": 100, "cache_enabled": True})
            changed = await client.patch("/proxy/api/config/app:a b/", json={"ip_blacklist": "127.0.0.1"})
            version = changed.json()["version"]
            async with asyncio.timeout(DEADLINE * 2):
                while True:
                    nodes = (await client.get("/proxy/api/nodes/")).json()["nodes"]
                    if nodes and nodes[0]["config_version"] == version:
                        break
                    await asyncio.sleep(0.05)
            assert (nodes[0]["node"], nodes[0]["source_app"], nodes[0]["config_expected"]) == (
                "capture-0",
                "a b",
                version,
            )
            assert (await curl(proxy, f"http://127.0.0.1:{upstream.port}/plain")).status != 200
            assert not upstream.seen
