"""`megido capture`: the proxy as a service of its own."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping

from mitmproxy import exceptions
from mitmproxy.proxy import mode_specs
from prometheus_client import CollectorRegistry

from megido_capture.addon import HELP, MegidoAddon, certificate
from megido_capture.flags import options_of, parser
from megido_capture.limits import raise_open_files
from megido_capture.master import CaptureMaster
from megido_shared.errors import ConfigurationError
from megido_shared.ops import OpsServer
from megido_shared.service import guard, setup_logging, stop_on_signals

BUSY_OBJECTS = 50_000
"""Young objects between two collections of the garbage collector: flows are freed by reference counts."""


def main(argv: list[str] | None = None) -> int:
    return guard(lambda: _main(sys.argv[1:] if argv is None else argv, os.environ))


def _main(argv: list[str], env: Mapping[str, str]) -> int:
    arguments = parser(HELP).parse_args(argv)
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
    try:
        master.options.update(**options_of(arguments, modes))
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
