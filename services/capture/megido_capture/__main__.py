"""`megido capture`: the proxy as a service of its own."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from mitmproxy import exceptions
from mitmproxy.proxy import mode_specs
from prometheus_client import CollectorRegistry

from megido_capture.addon import HELP, MegidoAddon, certificate
from megido_capture.limits import raise_open_files
from megido_capture.master import CaptureMaster
from megido_capture.settings import JOURNAL_POLICIES, CaptureSettings, defaults_from_env
from megido_shared.errors import ConfigurationError
from megido_shared.ops import OpsServer
from megido_shared.service import guard, setup_logging, stop_on_signals

METRICS_PORT = 9490
BUSY_OBJECTS = 50_000
"""Young objects between two collections of the garbage collector: flows are freed by reference counts."""


def parser(defaults: CaptureSettings) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="megido capture",
        description="Proxy HTTP, HTTPS and WebSocket traffic and record it in the journal.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--listen-host", default="127.0.0.1", help="Address to listen on.")
    made.add_argument("--listen-port", type=int, default=8080, help="Port to listen on; 0 picks a free one.")
    made.add_argument(
        "--mode", action="append", help="mitmproxy's mode: regular, upstream:URL, reverse:URL, socks5, ... Repeatable."
    )
    made.add_argument("--api-url", default=defaults.api_url, help=HELP["api_url"])
    made.add_argument("--source-app", default=defaults.source_app, help=HELP["source_app"])
    made.add_argument(
        "--auth-required", action=argparse.BooleanOptionalAction, default=False, help=HELP["auth_required"]
    )
    made.add_argument("--auth-token", default=None, help=HELP["auth_token"] + " Better: PROXY_AUTH_TOKEN.")
    made.add_argument("--max-body-size", type=int, default=defaults.max_body_size, help=HELP["max_body_size"])
    made.add_argument(
        "--websocket-enabled", action=argparse.BooleanOptionalAction, default=True, help=HELP["websocket_enabled"]
    )
    made.add_argument(
        "--websocket-max-message",
        type=int,
        default=defaults.websocket_max_message,
        help=HELP["websocket_max_message"],
    )
    made.add_argument("--connection-timeout", type=int, default=30, help=HELP["connection_timeout"])
    made.add_argument("--cache-ttl", type=int, default=60, help=HELP["cache_ttl"])
    made.add_argument("--transfer-timeout", type=int, default=0, help=HELP["transfer_timeout"])
    made.add_argument(
        "--max-concurrent-clients",
        type=int,
        default=defaults.max_concurrent_clients,
        help=HELP["max_concurrent_clients"],
    )
    made.add_argument("--max-clients-per-address", type=int, default=0, help=HELP["max_clients_per_address"])
    made.add_argument("--header-timeout", type=int, default=defaults.header_timeout, help=HELP["header_timeout"])
    made.add_argument("--journal-cap", default=defaults.journal_cap, metavar="SIZE", help=HELP["journal_cap"])
    made.add_argument(
        "--journal-policy", default=defaults.journal_policy, choices=JOURNAL_POLICIES, help=HELP["journal_policy"]
    )
    made.add_argument("--journal-wait", type=int, default=defaults.journal_wait, help=HELP["journal_wait"])
    made.add_argument(
        "--allow-open-proxy", action=argparse.BooleanOptionalAction, default=False, help=HELP["allow_open_proxy"]
    )
    made.add_argument("--ssl-insecure", action="store_true", help="Do not verify the certificates of servers.")
    made.add_argument("--data-dir", default="", help="Data directory. Default: MEGIDO_DATA_DIR or the XDG data home.")
    made.add_argument("--kafka", default="", metavar="HOST:PORT", help="Kafka; none: the local bus.")
    made.add_argument("--node-name", default="capture", help="Name of the node's slot in the data directory.")
    made.add_argument(
        "--forwarder", action=argparse.BooleanOptionalAction, default=True, help="Ship the journal by a child process."
    )
    made.add_argument(
        "--fastpath", action=argparse.BooleanOptionalAction, default=True, help="Replace mitmproxy's hot spots."
    )
    made.add_argument("--metrics-port", type=int, default=METRICS_PORT, help="/livez, /readyz, /metrics; 0 picks one.")
    made.add_argument(
        "--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help="Any option of mitmproxy."
    )
    return made


def main(argv: list[str] | None = None) -> int:
    return guard(lambda: _main(sys.argv[1:] if argv is None else argv, os.environ))


def _main(argv: list[str], env: Mapping[str, str]) -> int:
    defaults = CaptureSettings(**defaults_from_env(env))
    arguments = parser(defaults).parse_args(argv)
    setup_logging()
    # What mitmproxy says about each connection and stream is traffic, not the service's log.
    logging.getLogger("mitmproxy").setLevel(logging.ERROR)
    logging.getLogger("mitmproxy.addons.proxyserver").setLevel(logging.CRITICAL)  # we say it in one line
    asyncio.run(_serve(arguments, env))
    return 0


async def _serve(arguments: argparse.Namespace, env: Mapping[str, str]) -> None:
    stop = stop_on_signals()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    modes = arguments.mode or ["regular"]
    _check_modes(modes)
    addon = MegidoAddon(env, hosted=False)
    master = CaptureMaster(addon, modes, fast=arguments.fastpath)
    _configure(master, arguments, modes)
    ready: list[str] = ["the proxy does not listen yet"]
    registry = CollectorRegistry()
    assert addon.node is not None
    raise_open_files(addon.node.settings.max_concurrent_clients)
    registry.register(addon.node.figures)
    ops = _ops(registry, ready, arguments.metrics_port)
    try:
        # Until here everything made stays: collections need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(BUSY_OBJECTS, 20, 100)
        await master.serve(stop, lambda: _ready(master, ready, ops))
    finally:
        ops.close()


def _configure(master: CaptureMaster, arguments: argparse.Namespace, modes: list[str]) -> None:
    """Flags, then `--set` (which wins); the node is made last. Raises ConfigurationError."""
    flags: dict[str, Any] = {
        "listen_host": arguments.listen_host,
        "listen_port": arguments.listen_port,
        "mode": modes,
        "ssl_insecure": arguments.ssl_insecure,
        "api_url": arguments.api_url,
        "source_app": arguments.source_app,
        "auth_required": arguments.auth_required,
        "max_body_size": arguments.max_body_size,
        "websocket_enabled": arguments.websocket_enabled,
        "websocket_max_message": arguments.websocket_max_message,
        "connection_timeout": arguments.connection_timeout,
        "cache_ttl": arguments.cache_ttl,
        "transfer_timeout": arguments.transfer_timeout,
        "max_concurrent_clients": arguments.max_concurrent_clients,
        "max_clients_per_address": arguments.max_clients_per_address,
        "header_timeout": arguments.header_timeout,
        "journal_cap": arguments.journal_cap,
        "journal_policy": arguments.journal_policy,
        "journal_wait": arguments.journal_wait,
        "allow_open_proxy": arguments.allow_open_proxy,
        "megido_data_dir": arguments.data_dir,
        "megido_kafka": arguments.kafka,
        "megido_node": arguments.node_name,
        "megido_forwarder": arguments.forwarder,
    }
    if arguments.auth_token is not None:
        flags["auth_token"] = arguments.auth_token
    try:
        master.options.update(**flags)
        master.options.set(*arguments.options)
        master.capture.begin()
    except exceptions.OptionsError as error:
        raise ConfigurationError(str(error).partition("\n")[0]) from error


def _check_modes(modes: list[str]) -> None:
    for mode in modes:
        try:
            mode_specs.ProxyMode.parse(mode)
        except ValueError as error:
            raise ConfigurationError(f"mode {mode!r} is none of mitmproxy's: {error}") from None


def _ops(registry: CollectorRegistry, ready: list[str], port: int) -> OpsServer:
    try:
        return OpsServer(registry, lambda: ready, port=port)
    except OSError as error:
        raise ConfigurationError(
            f"metrics port {port} cannot be bound ({error.strerror}); try --metrics-port 0"
        ) from None


def _ready(master: CaptureMaster, ready: list[str], ops: OpsServer) -> None:
    ready.clear()
    node = master.capture.node
    assert node is not None
    sys.stdout.write(
        f"megido capture: proxy on {node.listening()}, node {node.journal.node}, "
        f"certificate {certificate(master.options.confdir)}, metrics on 127.0.0.1:{ops.port}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
