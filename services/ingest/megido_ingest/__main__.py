"""`megido-ingest`: stores what the bus carries, and does the background work. The parts are put together here."""

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megido_ingest import limit
from megido_ingest.health import Health
from megido_ingest.jsonlogs import LAYOUTS, LogLayout
from megido_ingest.leader import Leader
from megido_ingest.metrics import Metrics
from megido_ingest.monitor import watch
from megido_ingest.store import Store
from megido_ingest.worker import Worker
from megido_shared import service
from megido_shared.bus.open import open_bus
from megido_shared.clock import SystemClock
from megido_shared.db import migrate
from megido_shared.db.connect import hide_password, parse_url
from megido_shared.errors import ConfigurationError, Unavailable
from megido_shared.ops import OpsServer
from megido_shared.settings import DEFAULT_LOG_DIR, METRICS_PORTS, Common, common_from_env

DEFAULT_METRICS_PORT = METRICS_PORTS["ingest"]
STOP_S = 11.0
"""A stop that takes longer is cut off: whatever is not committed is still on the bus."""
_RETRY_S = 1.0

_log = logging.getLogger("megido_ingest")


@dataclass(frozen=True, slots=True)
class Settings:
    common: Common
    log_dir: Path
    metrics_port: int
    max_dead_letters: int
    log_layout: LogLayout = "tree"


def parse(argv: Sequence[str] | None, env: Mapping[str, str]) -> Settings:
    """Flags win over the environment. Raises ConfigurationError."""
    parser = argparse.ArgumentParser("megido ingest", description="Stores captured traffic in Postgres and JSON logs.")
    parser.add_argument("--data-dir", default="", help="data directory (MEGIDO_DATA_DIR)")
    parser.add_argument("--kafka", default="", metavar="HOST:PORT", help="Kafka (MEGIDO_KAFKA); none: the local bus")
    parser.add_argument("--database-url", default="", help="postgresql:// URL (MEGIDO_DATABASE_URL)")
    parser.add_argument(
        "--log-dir", default=env.get("PROXY_LOG_DIR", DEFAULT_LOG_DIR), help="root of the JSON logs (PROXY_LOG_DIR)"
    )
    parser.add_argument(
        "--log-layout",
        default=env.get("MEGIDO_LOG_LAYOUT") or "tree",
        help="tree: a file an entry; ndjson: a file an hour, for high rates; off (MEGIDO_LOG_LAYOUT, default tree)",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=DEFAULT_METRICS_PORT,
        help="port of /livez, /readyz and /metrics on loopback; 0 picks a free one (default %(default)s)",
    )
    parser.add_argument(
        "--max-dead-letters",
        metavar="N",
        default=env.get("MEGIDO_MAX_DEAD_LETTERS") or limit.DEFAULT,
        help="storing stops when a minute brings more, or a tenth of it that is a fifth of all records; 0: no limit "
        "(MEGIDO_MAX_DEAD_LETTERS, default 1000)",
    )
    given = parser.parse_args(argv)
    common = common_from_env(env, data_dir=given.data_dir, kafka=given.kafka, database_url=given.database_url)
    if not common.database_url:
        raise ConfigurationError("ingest needs a database; pass --database-url or set MEGIDO_DATABASE_URL")
    parse_url(common.database_url)
    common.data_dir.ensure()
    return Settings(
        common,
        Path(given.log_dir).absolute(),
        given.metrics_port,
        _count(given.max_dead_letters),
        _layout(given.log_layout),
    )


def _layout(given: str) -> LogLayout:
    found = next((name for name in LAYOUTS if name == given), None)
    if found is None:
        raise ConfigurationError(f"--log-layout is {given!r}; there are {', '.join(LAYOUTS)}")
    return found


def _count(given: str | int) -> int:
    if str(given).isascii() and str(given).isdigit():
        return int(given)
    raise ConfigurationError(f"--max-dead-letters is {given!r}; it must be a whole number, 0 for no limit")


async def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. Raises ConfigurationError when it cannot ever work."""
    stop = service.stop_on_signals("megido ingest")
    common = settings.common
    metrics = Metrics("records" if common.kafka else "bytes")
    health = Health()
    ops = _ops_server(metrics, health, settings.metrics_port)
    bus = open_bus(common)
    store = Store(common.database_url, max_dead_letters=settings.max_dead_letters)
    try:
        if not await _wait_for_schema(common.database_url, stop):
            return
        worker = Worker(bus, store, metrics, health)
        leader = Leader(
            common.database_url,
            bus,
            settings.log_dir,
            clock=SystemClock(),
            metrics=metrics,
            health=health,
            log_layout=settings.log_layout,
            data_dir=common.data_dir,
        )
        tasks = [
            asyncio.create_task(worker.run(stop)),
            asyncio.create_task(leader.run(stop)),
            asyncio.create_task(watch(bus=bus, store=store, worker=worker, metrics=metrics, health=health, stop=stop)),
            asyncio.create_task(_say_ready(health, ops.port, stop)),
        ]
        await _until_stopped(tasks, stop)
    finally:
        async with asyncio.timeout(5):
            await store.close()
            await bus.close()
        ops.close()


async def _until_stopped(tasks: list[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """A part that fails ends the service: it is started again from what is stored."""
    stopping = asyncio.create_task(stop.wait())
    running = set(tasks)
    failed: BaseException | None = None
    while running and not stop.is_set() and failed is None:
        done, _ = await asyncio.wait({*running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & running:
            running.discard(task)
            failed = failed or task.exception()
    stop.set()
    stopping.cancel()
    if running:
        _, late = await asyncio.wait(running, timeout=STOP_S)
        for task in late:
            task.cancel()
        results = await asyncio.gather(*running, return_exceptions=True)
        failed = failed or next((r for r in results if isinstance(r, Exception)), None)
    if failed is not None:
        raise failed


async def _wait_for_schema(url: str, stop: asyncio.Event) -> bool:
    """Waits for a database that is away, and says so once. False when stopped meanwhile. Raises
    ConfigurationError for one whose schema is not ours."""
    said = False
    while not stop.is_set():
        try:
            await asyncio.to_thread(migrate.require_current, url)
        except Unavailable as error:
            if not said:
                sys.stderr.write(f"megido: waiting: {error}\n")
            said = True
            try:
                await asyncio.wait_for(stop.wait(), _RETRY_S)
            except TimeoutError:
                continue
        else:
            return True
    return False


async def _say_ready(health: Health, port: int, stop: asyncio.Event) -> None:
    while not stop.is_set():
        if not health.missing():
            sys.stdout.write(f"megido ingest is ready; metrics at http://127.0.0.1:{port}/metrics\n")
            sys.stdout.flush()
            return
        try:
            await asyncio.wait_for(stop.wait(), 0.05)
        except TimeoutError:
            continue


def _ops_server(metrics: Metrics, health: Health, port: int) -> OpsServer:
    try:
        return OpsServer(metrics.registry, health.missing, port=port)
    except OSError as error:
        raise ConfigurationError(
            f"port {port} cannot be used for metrics ({error.strerror}); choose another with --metrics-port"
        ) from error


def tune_interpreter() -> None:
    """For one busy preparing thread beside the event loop.

    A batch is tens of thousands of objects without cycles, all freed by counting: looking for cycles at every few
    hundred of them costs a tenth of the preparation. And the loop sends a batch in dozens of steps; at the usual
    5 ms it would wait that long at each of them for the thread to let go of the interpreter.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    sys.setswitchinterval(0.000_2)


def main(argv: Sequence[str] | None = None) -> int:
    service.setup_logging()

    def run() -> None:
        settings = parse(argv, os.environ)
        _log.info("storing in %s", hide_password(settings.common.database_url))
        tune_interpreter()
        asyncio.run(serve(settings))

    return service.guard(run)


if __name__ == "__main__":
    sys.exit(main())
