"""CPU a flow without sockets: the proxy of `megido capture`, everything recorded, and the same proxy without capture.

Each is a child process that hands whole requests and answers to mitmproxy's layers in the place of the transports, so
nothing but the proxy's own work is in the figure: no system calls but those of the journal, no upstream, no loop.
Rounds alternate A B A B; the figure is CPU time, the median of the rounds. What capture adds here is what it adds on
the wire; the ratio is the larger, because reading from and writing to sockets is in neither.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from statistics import median
from typing import Any

from mitmproxy.connection import ConnectionState
from mitmproxy.proxy import commands, events, layers, mode_servers, mode_specs, server, server_hooks
from mitmproxy.utils import asyncio_utils

from benchmarks.capture import ANSWER, HEADERS, HERE, pin
from benchmarks.report import finish, say
from megido_capture.__main__ import collect_seldom
from megido_capture.addon import MegidoAddon
from megido_capture.master import CaptureMaster

VARIANTS = ("megido", "lean")
REQUEST = f"GET http://upstream.test:8080/items/1?page=2 HTTP/1.1\r\nHost: upstream.test:8080\r\n{HEADERS}".encode()
CLIENTS = 16


class Writer:
    """Stands for a connection's stream: keeps nothing of what is written to it."""

    def __init__(self, peername: tuple[str, int]) -> None:
        self.written = 0
        self._names = {"peername": peername, "sockname": ("127.0.0.1", 8080)}

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._names.get(name, default)

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written += len(data)


class Connection:
    """A client with its upstream, without a socket."""

    def __init__(self, master: CaptureMaster, number: int) -> None:
        self.client = Writer(("127.0.0.1", 20_000 + number))
        self.upstream = Writer(("127.0.0.1", 8080))
        mode = mode_specs.ProxyMode.parse("regular@8080")
        make: Any = mode_servers.ProxyConnectionHandler
        self.handler = make(master, None, self.client, master.options, mode)
        self.handler.layer = layers.modes.HttpProxy(self.handler.layer.context)  # as the server of a mode does
        self.handler.open_connection = self._open
        master.proxyserver.connections[self.handler.client.id] = self.handler
        self._server: Any = None

    async def begin(self) -> None:
        await self.handler.handle_hook(server_hooks.ClientConnectedHook(self.handler.client))
        await self.handler.server_event(events.Start())

    async def _open(self, command: commands.OpenConnection) -> None:
        """As `ConnectionHandler.open_connection`."""
        self._server = opened = command.connection
        data = server_hooks.ServerConnectionHookData(client=self.handler.client, server=opened)
        await self.handler.handle_hook(server_hooks.ServerConnectHook(data))
        await asyncio.sleep(0)  # as a connect does: the handler has its task before there is a transport
        opened.timestamp_start = opened.timestamp_tcp_setup = time.time()
        opened.state = ConnectionState.OPEN
        opened.peername = self.upstream.get_extra_info("peername")
        opened.sockname = self.upstream.get_extra_info("sockname")
        self.handler.transports[opened] = server.ConnectionIO(None, None, self.upstream)
        await self.handler.handle_hook(server_hooks.ServerConnectedHook(data))
        await self.handler.server_event(events.OpenConnectionCompleted(command, None))

    async def first(self) -> None:
        self.handler.handle(events.DataReceived(self.handler.client, REQUEST))
        while not self.upstream.written:
            await asyncio.sleep(0)
        self.handler.handle(events.DataReceived(self._server, ANSWER))

    def exchange(self) -> None:
        handler = self.handler
        handler.handle(events.DataReceived(handler.client, REQUEST))
        handler.handle(events.DataReceived(self._server, ANSWER))


async def child(variant: str, directory: str) -> None:
    """For each number that comes in it does so many exchanges, and answers with microseconds of CPU for each: of the
    thread that serves, and of the process."""
    master = CaptureMaster(MegidoAddon({}, hosted=False), ["regular"])
    data_dir = {"megido_data_dir": directory, "megido_forwarder": False}
    master.options.update(listen_host="127.0.0.1", listen_port=0, confdir=directory, **data_dir)
    if variant == "megido":
        master.capture.begin()
    with asyncio_utils.set_eager_task_factory():
        master.dispatcher.forget()
        await master.running()
        connections = [Connection(master, number) for number in range(CLIENTS)]
        for connection in connections:
            await connection.begin()
            await connection.first()
        collect_seldom()
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(await run(connections, int(line))), flush=True)
        for connection in connections:
            assert connection.client.written % len(ANSWER) == 0, "not every exchange had its answer"
        await master.done()


async def run(connections: list[Connection], flows: int) -> tuple[float, float]:
    thread, process = time.thread_time(), time.process_time()
    for _ in range(flows // len(connections)):
        for connection in connections:
            connection.exchange()
        await asyncio.sleep(0)  # a turn of the loop for what is done beside
    done = flows // len(connections) * len(connections) / 1e6
    return (time.thread_time() - thread) / done, (time.process_time() - process) / done


@contextlib.contextmanager
def started(variant: str, directory: Path) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.flow_cost", "--child", variant, "--directory", str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE) as process:
        yield process


def measure(process: subprocess.Popen[str], flows: int) -> tuple[float, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{flows}\n")
    process.stdin.flush()
    thread, whole = json.loads(process.stdout.readline())
    return thread, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--flows", type=int, default=4_000, help="in one round")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("mitmproxy").setLevel(logging.ERROR)
    if arguments.child:
        asyncio.run(child(arguments.child, arguments.directory))
        return
    pin(os.getpid(), min(os.sched_getaffinity(0)))
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="megido-bench-") as name, contextlib.ExitStack() as stack:
        running = {variant: stack.enter_context(started(variant, Path(name) / variant)) for variant in VARIANTS}
        for process in running.values():
            measure(process, arguments.flows)
        for number in range(arguments.rounds):
            for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
                found[variant].append(measure(running[variant], arguments.flows))
            say("  " + ", ".join(f"{variant}: {found[variant][-1][0]:.1f} µs" for variant in VARIANTS))
    report(found, arguments)


def report(found: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> None:
    thread = {variant: median(one for one, _ in rounds) for variant, rounds in found.items()}
    process = {variant: median(one for _, one in rounds) for variant, rounds in found.items()}
    figures = {f"{variant}_us": round(value, 1) for variant, value in thread.items()}
    detail = {
        "rounds": arguments.rounds,
        "flows": arguments.flows,
        "process_us": {variant: round(value, 1) for variant, value in process.items()},
        "pairs_ratio": round(median(a[0] / b[0] for a, b in zip(found["megido"], found["lean"], strict=True)), 3),
    }
    figures["ratio"] = round(thread["megido"] / thread["lean"], 3)
    say(json.dumps(detail))
    finish("flow-cost", figures, detail=detail, packages=("mitmproxy", "msgspec"))


if __name__ == "__main__":
    main()
