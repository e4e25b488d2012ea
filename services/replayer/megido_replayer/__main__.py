"""`megido replayer`: sends recorded requests again. Everything is composed here."""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import uvloop
from sqlalchemy.ext.asyncio import AsyncEngine

from megido_replayer.addresses import Endpoint, parse_endpoints
from megido_replayer.attempt import Tools
from megido_replayer.health import Health
from megido_replayer.metrics import Metrics
from megido_replayer.notifications import listen
from megido_replayer.recording import Recorder
from megido_replayer.settings import DEFAULT_MAX_BODY_SIZE, DEFAULT_METRICS_PORT, Settings
from megido_replayer.transport import Sender, TlsContexts
from megido_replayer.worker import Parts, Worker
from megido_shared.addresses import database_endpoints
from megido_shared.bus.forwarder_child import ForwarderChild, keep_running
from megido_shared.bus.local import Journal
from megido_shared.bus.open import open_bus
from megido_shared.clock import SystemClock
from megido_shared.db.connect import create_engine
from megido_shared.errors import ConfigurationError
from megido_shared.ops import OpsServer
from megido_shared.service import guard, setup_logging, stop_on_signals
from megido_shared.settings import (
    DEFAULT_JOURNAL_CAP,
    METRICS_PORTS,
    MIN_JOURNAL_CAP,
    Common,
    common_from_env,
    parse_size,
)

_log = logging.getLogger(__name__)
_OWN_BY_DEFAULT = ",".join(f"localhost:{port}" for port in (8000, 8080, *METRICS_PORTS.values()))
_CLOSE_S = 1.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="megido replayer",
        description="Send recorded requests again, byte for byte, and record the answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--data-dir", default="", help="Data directory. Default: MEGIDO_DATA_DIR or the XDG data home.")
    made.add_argument("--kafka", default="", metavar="HOST:PORT", help="Kafka; none: the local bus.")
    made.add_argument("--database-url", default="", help="postgresql:// URL. Default: MEGIDO_DATABASE_URL.")
    made.add_argument(
        "--metrics-port", type=int, default=DEFAULT_METRICS_PORT, help="/livez, /readyz, /metrics; 0 picks one."
    )
    made.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="Never replay to this endpoint of Megido's (repeatable; MEGIDO_PROTECT too). The database, Kafka, the "
        "nodes' own listeners and, unless --protect is given, Megido's default ports are protected anyway.",
    )
    made.add_argument(
        "--concurrency", type=int, default=1, help="Items of one job sent at a time; 1 keeps their order."
    )
    made.add_argument("--max-jobs", type=int, default=8, help="Jobs run at the same time.")
    made.add_argument(
        "--max-body-size", type=int, default=DEFAULT_MAX_BODY_SIZE, help="Bytes of a body that are stored."
    )
    made.add_argument(
        "--journal-cap",
        default=DEFAULT_JOURNAL_CAP,
        metavar="SIZE",
        help="Size on disk (like 512MiB) of what is not stored or shipped yet; nothing is sent while it is reached.",
    )
    made.add_argument("--ca-file", default="", help="PEM file of further certificate authorities to trust.")
    made.add_argument(
        "--lease", type=float, default=30.0, help="Seconds after which a silent replayer loses its items."
    )
    made.add_argument(
        "--forwarder", action=argparse.BooleanOptionalAction, default=True, help="With Kafka: ship the journal too."
    )
    return made


def main(argv: list[str] | None = None) -> int:
    return guard(lambda: _main(sys.argv[1:] if argv is None else argv, os.environ))


def _main(argv: list[str], env: Mapping[str, str]) -> int:
    arguments = parser().parse_args(argv)
    setup_logging()
    settings = read_settings(arguments, env)
    uvloop.run(_until_signalled(settings, forwarder=arguments.forwarder))
    return 0


async def _until_signalled(settings: Settings, *, forwarder: bool) -> None:
    await serve(settings, stop_on_signals("megido replayer"), forwarder=forwarder)


def read_settings(arguments: argparse.Namespace, env: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError, in one line, on what cannot work."""
    common = common_from_env(
        env, data_dir=arguments.data_dir, kafka=arguments.kafka, database_url=arguments.database_url
    )
    if not common.database_url:
        raise ConfigurationError("no database: give --database-url or set MEGIDO_DATABASE_URL")
    if arguments.concurrency < 1 or arguments.max_jobs < 1:
        raise ConfigurationError("--concurrency and --max-jobs must be 1 at least")
    if arguments.max_body_size < 0 or arguments.lease < 1:
        raise ConfigurationError("--max-body-size must not be negative, --lease must be 1 second at least")
    ca_file = Path(arguments.ca_file) if arguments.ca_file else None
    TlsContexts(ca_file).get(True)
    return Settings(
        common=common,
        metrics_port=arguments.metrics_port,
        concurrency=arguments.concurrency,
        max_jobs=arguments.max_jobs,
        max_body_size=arguments.max_body_size,
        protected=tuple(_protected(arguments.protect, common, env)),
        ca_file=ca_file,
        lease_s=arguments.lease,
        journal_cap_bytes=parse_size("--journal-cap", arguments.journal_cap, MIN_JOURNAL_CAP),
    )


def _protected(given: list[str], common: Common, env: Mapping[str, str]) -> list[Endpoint]:
    named = ",".join([*given, env.get("MEGIDO_PROTECT", "")]).strip(",") or _OWN_BY_DEFAULT
    database = database_endpoints(common.database_url)
    try:
        return [*parse_endpoints(named), *database, *parse_endpoints(common.kafka)]
    except ValueError as error:
        raise ConfigurationError(f"an endpoint to protect, or Kafka's address: {error}") from error


async def serve(settings: Settings, stop: asyncio.Event, *, forwarder: bool = True) -> None:
    """The whole service until `stop` is set."""
    health, metrics = Health(), Metrics()
    async with contextlib.AsyncExitStack() as stack:
        ops = _ops(metrics, health, settings.metrics_port)
        stack.callback(ops.close)
        settings = replace(settings, protected=(*settings.protected, Endpoint("localhost", ops.port)))
        journal = Journal.open(settings.common.data_dir, "replayer", cap_bytes=settings.journal_cap_bytes)
        stack.callback(journal.close)
        engine = create_engine(settings.common.database_url, application_name="megido-replayer", pool_size=10)
        stack.push_async_callback(_briefly, engine.dispose)
        bus = open_bus(settings.common)
        stack.push_async_callback(_briefly, bus.close)
        tools = _tools(settings, engine, journal, metrics)
        stack.callback(tools.sender.close)
        parts = Parts(settings, engine, journal, tools, health, metrics, wake=asyncio.Event(), stop=stop)
        tasks = [
            asyncio.create_task(listen(bus, parts.wake, health)),
            asyncio.create_task(_beat(parts, ops)),
        ]
        if settings.common.kafka and forwarder:
            tasks.append(
                asyncio.create_task(keep_running(ForwarderChild(settings.common.data_dir, kafka=settings.common.kafka)))
            )
        stack.push_async_callback(_cancel, tasks)
        tools.recorder.status("started", **_status(parts))
        await Worker(parts).run()
        tools.recorder.status("stopping", **_status(parts))


def _tools(settings: Settings, engine: AsyncEngine, journal: Journal, metrics: Metrics) -> Tools:
    clock = SystemClock()
    return Tools(
        engine=engine,
        sender=Sender(TlsContexts(settings.ca_file)),
        recorder=Recorder(journal, clock, settings.max_body_size),
        clock=clock,
        # Hosts with a data directory of their own all have a node replayer-0: the epoch tells them apart.
        me=f"{journal.node}/{journal.epoch.hex()}",
        lease_s=settings.lease_s,
        max_body_size=settings.max_body_size,
        metrics=metrics,
    )


async def _beat(parts: Parts, ops: OpsServer) -> None:
    """Heartbeats, and the one line that says that it is ready."""
    said = False
    next_beat = 0.0
    loop = asyncio.get_running_loop()
    while True:
        if not said and not parts.health.missing():
            said = True
            _log.info("ready: %s, probes and metrics on http://127.0.0.1:%d", parts.journal.node, ops.port)
        if loop.time() >= next_beat:
            next_beat = loop.time() + parts.settings.heartbeat_s
            parts.metrics.dropped.set(parts.journal.dropped)
            parts.tools.recorder.status("running", **_status(parts))
        await asyncio.sleep(0.1 if not said else parts.settings.heartbeat_s)


def _status(parts: Parts) -> dict[str, object]:
    counters = parts.journal.figures() | parts.metrics.counts
    return {"version": version("megido"), "pid": os.getpid(), "counters": counters}


def _ops(metrics: Metrics, health: Health, port: int) -> OpsServer:
    try:
        return OpsServer(metrics.registry, health.missing, port=port)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"port {port} for probes and metrics cannot be used ({error}); choose another with --metrics-port"
        ) from error


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_CLOSE_S)


async def _briefly(close: Callable[[], Awaitable[None]]) -> None:
    """What cannot be reached any more must not hold up the end."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await close()


if __name__ == "__main__":
    sys.exit(main())
