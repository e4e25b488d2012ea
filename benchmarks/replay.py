"""How fast the replayer's transport sends, against aiohttp.

`sender_ratio`: requests/s of `megido_replayer.transport.Sender` ÷ requests/s of an aiohttp session, each on one core,
16 keep-alive connections, 1 KiB answers, over HTTP. The target is a bare uvloop protocol on the other core; its own
limit, with a client that does not even parse, is in the detail, to show that it is not what is measured.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from statistics import median

import aiohttp
import uvloop

from benchmarks.report import finish, ratio, say
from megido_replayer.transport import Origin, RawRequest, Sender

CONNECTIONS = 16
BODY = b"x" * 1024
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: bench\r\nDate: Tue, 24 Nov 2026 12:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1024\r\nConnection: keep-alive\r\nCache-Control: no-store\r\n\r\n" + BODY
)
HEADERS = [
    (b"Host", b"127.0.0.1"),
    (b"User-Agent", b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0"),
    (b"Accept", b"application/json, */*;q=0.8"),
    (b"Accept-Language", b"en-GB,en;q=0.9"),
    (b"Accept-Encoding", b"gzip, deflate, br"),
    (b"Cookie", b"session=0123456789abcdef0123456789abcdef"),
    (b"X-Request-Id", b"4bf92f3577b34da6a3ce929d0e0e4736"),
]
TARGET = b"/v1/items/42?page=3"

type Step = Callable[[], Awaitable[None]]


class _Target(asyncio.Protocol):
    """Answers once for each empty line: GETs only."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._seen = b""

    def data_received(self, data: bytes) -> None:
        self._seen += data
        count = self._seen.count(b"\r\n\r\n")
        if count:
            self._seen = self._seen.rpartition(b"\r\n\r\n")[2]
            self._transport.write(ANSWER * count)  # type: ignore[attr-defined]


class _Limit(asyncio.Protocol):
    """A client that counts bytes."""

    def __init__(self) -> None:
        self.waiter: asyncio.Future[None] | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left <= 0 and self.waiter is not None:
            self.waiter.set_result(None)
            self.waiter = None

    async def exchange(self, data: bytes) -> None:
        self._left = len(ANSWER)
        self.waiter = asyncio.get_running_loop().create_future()
        waiter = self.waiter
        self._transport.write(data)  # type: ignore[attr-defined]
        await waiter


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(_Target, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _sender(port: int, seconds: float) -> tuple[float, float]:
    sender = Sender()
    origin = Origin("http", "127.0.0.1", port, ("127.0.0.1",))
    request = RawRequest(b"GET", TARGET, HEADERS)

    async def step() -> None:
        response = await sender.send(request, origin)
        assert response.body_size == len(BODY)

    return await _drive([step] * CONNECTIONS, seconds)


async def _aiohttp(port: int, seconds: float) -> tuple[float, float]:
    url = f"http://127.0.0.1:{port}{TARGET.decode()}"
    headers = {name.decode(): value.decode() for name, value in HEADERS}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    ) as session:

        async def step() -> None:
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                assert len(await response.read()) == len(BODY)

        return await _drive([step] * CONNECTIONS, seconds)


async def _limit(port: int, seconds: float) -> tuple[float, float]:
    lines = b"".join(b"%b: %b\r\n" % pair for pair in HEADERS)
    data = b"GET " + TARGET + b" HTTP/1.1\r\n" + lines + b"\r\n"
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(_Limit, "127.0.0.1", port))[1] for _ in range(CONNECTIONS)]

    def step_of(client: _Limit) -> Step:
        return lambda: client.exchange(data)

    return await _drive([step_of(client) for client in clients], seconds)


async def _drive(steps: list[Step], seconds: float) -> tuple[float, float]:
    """(requests/s, CPU µs a request), after a second of warming up."""
    count = 0
    running = True

    async def work(step: Step) -> None:
        nonlocal count
        while running:
            await step()
            count += 1

    tasks = [asyncio.create_task(work(step)) for step in steps]
    await asyncio.sleep(1.0)
    before, cpu, started = count, time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    done, took, spent = count - before, time.perf_counter() - started, time.process_time() - cpu
    running = False
    await asyncio.gather(*tasks)
    return done / took, spent / done * 1e6


CLIENTS = {"sender": _sender, "aiohttp": _aiohttp, "limit": _limit}


def _child(part: str, *arguments: str, core: int) -> list[str]:
    return ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.replay", "--part", part, *arguments]


def _measure(part: str, port: int, seconds: float) -> tuple[float, float]:
    command = _child(part, "--port", str(port), "--seconds", str(seconds), core=1)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate, cpu = map(float, output.split())
    say(f"{part:>8}: {rate:8.0f} requests/s, {cpu:6.1f} µs of CPU a request")
    return rate, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--part", choices=["all", "target", *CLIENTS], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "target":
        uvloop.run(_serve())
    elif arguments.part != "all":
        print(*uvloop.run(CLIENTS[arguments.part](arguments.port, arguments.seconds)))
    else:
        _all(arguments.rounds, arguments.seconds)
    return 0


def _all(rounds: int, seconds: float) -> None:
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("needs two cores: one for the target, one for the client")
    target = subprocess.Popen(_child("target", core=0), stdout=subprocess.PIPE, text=True)
    try:
        assert target.stdout is not None
        port = int(target.stdout.readline())
        limit = _measure("limit", port, seconds)
        taken: dict[str, list[tuple[float, float]]] = {"sender": [], "aiohttp": []}
        for _ in range(rounds):
            for part, figures in taken.items():
                figures.append(_measure(part, port, seconds))
    finally:
        target.kill()
        target.wait()
    rates = {part: [rate for rate, _ in figures] for part, figures in taken.items()}
    finish(
        "replay",
        {"sender_ratio": ratio(rates["sender"], rates["aiohttp"])},
        detail={
            "connections": CONNECTIONS,
            "requests_per_s": {part: [round(rate) for rate in some] for part, some in rates.items()},
            "cpu_us_per_request": {part: round(median(cpu for _, cpu in some), 1) for part, some in taken.items()},
            "target_limit_requests_per_s": round(limit[0]),
        },
        packages=("aiohttp", "httptools", "uvloop"),
    )


if __name__ == "__main__":
    sys.exit(main())
