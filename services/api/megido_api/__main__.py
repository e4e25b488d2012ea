"""`megido-api`: the query and control API."""

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI

from megido_api.app import create_app
from megido_api.health.endpoints import not_ready
from megido_api.server import BoundedHttpTools, Server
from megido_api.settings import Settings
from megido_shared.errors import ConfigurationError
from megido_shared.service import guard, setup_logging, stop_on_signals
from megido_shared.settings import DEFAULT_LOG_DIR, common_from_env

_GRACEFUL_S = 6
_READY_POLL_S = 0.2


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    setup_logging()
    return guard(lambda: _serve(settings_of(arguments, os.environ)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megido-api", description=__doc__)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (any but loopback needs MEGIDO_API_TOKEN)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name that clients may use in Host"
    )
    parser.add_argument("--database-url", default="", help="postgresql://… (MEGIDO_DATABASE_URL)")
    parser.add_argument("--data-dir", default="", help="where the local bus is (MEGIDO_DATA_DIR)")
    parser.add_argument(
        "--kafka", default="", metavar="HOST:PORT", help="Kafka instead of the local bus (MEGIDO_KAFKA)"
    )
    parser.add_argument(
        "--log-dir", default="", help="root of the JSON logs that ingest writes (PROXY_LOG_DIR, default logs/proxy)"
    )
    return parser


def settings_of(arguments: argparse.Namespace, env: Mapping[str, str]) -> Settings:
    """Raises ConfigurationError on settings that cannot work."""
    settings = Settings(
        common=common_from_env(
            env, data_dir=arguments.data_dir, kafka=arguments.kafka, database_url=arguments.database_url
        ),
        host=arguments.host,
        port=arguments.port,
        allow_hosts=tuple(arguments.allow_host),
        token=env.get("MEGIDO_API_TOKEN", ""),
        log_dir=Path(arguments.log_dir or env.get("PROXY_LOG_DIR") or DEFAULT_LOG_DIR).absolute(),
    )
    settings.check()
    if not settings.common.kafka:
        settings.common.data_dir.ensure()
    return settings


def _serve(settings: Settings) -> None:
    listener = listen(settings)
    asyncio.run(_run(settings, listener), loop_factory=uvloop.new_event_loop)


def listen(settings: Settings) -> socket.socket:
    """Bound before anything is started; ConfigurationError when that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --host or --port"
        ) from error
    return listener


async def _run(settings: Settings, listener: socket.socket) -> None:
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=BoundedHttpTools,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=_GRACEFUL_S,
    )
    server = Server(config)
    stop = stop_on_signals("megido api")
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.wait())
    ready = asyncio.create_task(_announce(app, server, listener))
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    app.state.stopping.set()
    server.should_exit = True
    await serving


async def _announce(app: FastAPI, server: Server, listener: socket.socket) -> None:
    """One line, once requests can be answered."""
    while not server.started or await not_ready(app.state.megido):  # noqa: ASYNC110 - Postgres sets no event of ours
        await asyncio.sleep(_READY_POLL_S)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"megido-api: ready on http://{shown}:{port} (documentation: /docs)\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
