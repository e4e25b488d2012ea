"""What has ended is freed at once: with ever new connections memory does not wait for the garbage collector."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from tests.integration.capture.harness import until
from tests.integration.capture.upstream import Upstream

CONNECTIONS = 12


async def test_ended_connections_leave_nothing_to_collect(
    tmp_path: Path, upstream: Upstream, upstream_tls: Upstream
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.uncollected", "--data-dir", str(tmp_path)),
        *("--listen-port", "0", "--metrics-port", "0", "--no-forwarder", "--ssl-insecure"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        ready = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        proxy = f"http://127.0.0.1:{ready.partition(' on 127.0.0.1:')[2].partition(',')[0]}"
        plain = [f"http://127.0.0.1:{upstream.port}/{path}" for path in ("plain/a", "chunked/700001", "sse/3")]
        secure = [f"https://127.0.0.1:{upstream_tls.port}/{path}" for path in ("plain/a", "chunked/700001")]
        for number in range(CONNECTIONS):
            await curl(proxy, *plain)
            await curl(proxy, "--http2" if number % 2 else "--http1.1", *secure)
            await curl(proxy, "--max-time", "0.3", f"http://127.0.0.1:{upstream.port}/stall")
            await curl(proxy, "http://127.0.0.1:1/")

        async def left() -> dict[str, int]:
            assert process.stdout is not None
            process.send_signal(signal.SIGUSR1)
            found: dict[str, Any] = json.loads(await asyncio.wait_for(process.stdout.readline(), 30))
            return dict(found["left"])

        await until(left, lambda found: not found)
        # An idle connection holds nothing of its exchanges either.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
        for _ in range(3):
            writer.write(b"GET http://127.0.0.1:%d/plain/b HTTP/1.1\r\nHost: x\r\n\r\n" % upstream.port)
            await asyncio.wait_for(reader.readuntil(b'{"answer": "b"}'), 30)
        await until(left, lambda found: not {"HTTPFlow", "HttpStream"} & found.keys())
        assert (await left())["Handler"] == 1
        writer.close()
    finally:
        process.terminate()
        _, said = await asyncio.wait_for(process.communicate(), 30)
    assert b"failed (" not in said, said.decode()


async def curl(proxy: str, *arguments: str) -> None:
    # A fresh connection to the proxy each time; what it answers is tested elsewhere.
    running = await asyncio.create_subprocess_exec(
        *("curl", "-sk", "-x", proxy, *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await asyncio.wait_for(running.wait(), 30)
