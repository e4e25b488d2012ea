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
from megido_capture.configuration.flags import options_of, parser
from megido_capture.limits.openfiles import raise_open_files
from megido_capture.logtext import bound_logs
from megido_capture.master import CaptureMaster
from megido_capture.stopping import LAST_RESORT, STOP, of_worker
from megido_capture.workers.figures import GroupFigures
from megido_capture.workers.group import Group
from megido_capture.workers.plan import planned
from megido_capture.workers.ports import reserve, share_ports
from megido_capture.workers.worker import Parent, Serving, Share
from megido_shared.addresses import Endpoint
from megido_shared.errors import ConfigurationError
from megido_shared.ops import OpsServer, Ready
from megido_shared.service import guard, setup_logging, stop_on_signals

BUSY_OBJECTS = 10_000
"""Young objects between two collections of the garbage collector. On the fast path flows and connections are freed by
reference counts, and few collections come at all; a larger number would make one stop the loop for long."""


def main(argv: list[str] | None = None) -> int:
    return guard(lambda: _main(sys.argv[1:] if argv is None else argv, os.environ))


def _main(argv: list[str], env: Mapping[str, str]) -> int:
    arguments = _arguments(argv)
    serve = _serve_group(argv, arguments, env) if arguments.workers > 1 else _serve(arguments, env)
    asyncio.run(serve)
    return 0


def serve_share(parent: Parent, argv: list[str], env: Mapping[str, str]) -> None:
    """What one of several workers does. Raises MegidoError."""
    arguments = _arguments(argv)
    arguments.mode, arguments.listen_port = parent.share.modes, parent.share.listen_port
    arguments.forwarder = False
    share_ports()
    asyncio.run(_serve(arguments, env, parent))


def _arguments(argv: list[str]) -> argparse.Namespace:
    arguments = parser(HELP).parse_args(argv)
    setup_logging()
    bound_logs()
    # What mitmproxy says about each connection and stream is traffic, not the service's log.
    logging.getLogger("mitmproxy").setLevel(logging.ERROR)
    logging.getLogger("mitmproxy.addons.proxyserver").setLevel(logging.CRITICAL)  # we say it in one line
    return arguments


async def _serve_group(argv: list[str], arguments: argparse.Namespace, env: Mapping[str, str]) -> None:
    stop = stop_on_signals("megido capture", STOP + LAST_RESORT)
    modes = arguments.mode or ["regular"]
    _check_modes(modes)
    reserved = reserve(modes, arguments.listen_host, arguments.listen_port)
    group = Group(arguments.workers)
    registry = CollectorRegistry()
    registry.register(GroupFigures(group))
    ops = _ops(registry, group.missing, arguments.metrics_port)
    stop_seconds = of_worker(forwarder=arguments.forwarder)
    share = Share(arguments.workers, reserved.modes, reserved.listen_port, ops.port, stop_seconds)

    def announce(serving: list[Serving]) -> None:
        nodes = ", ".join(worker.node for worker in serving)
        _announce(str(reserved), f"{len(serving)} workers ({nodes})", serving[0].certificate, ops.port)

    try:
        await group.serve(planned(share, argv, arguments, env), stop, announce)
    finally:
        ops.close()
        reserved.close()


async def _serve(arguments: argparse.Namespace, env: Mapping[str, str], parent: Parent | None = None) -> None:
    """`parent` is of a worker: it is told instead of whoever reads our output, and it shows our metrics."""
    stop_seconds = parent.share.stop_seconds if parent is not None else STOP
    # A name that is being resolved holds a thread, which nothing ends and the interpreter would wait for.
    stop = stop_on_signals("megido capture", stop_seconds + LAST_RESORT)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    modes = arguments.mode or ["regular"]
    _check_modes(modes)
    workers = parent.share.workers if parent is not None else 1
    addon = MegidoAddon(env, hosted=False, workers=workers, stop_seconds=stop_seconds)
    master = CaptureMaster(addon, modes, fast=arguments.fastpath)
    _configure(master, arguments, modes)
    missing: list[str] = ["the proxy does not listen yet"]
    registry = parent.registry if parent is not None else CollectorRegistry()
    assert addon.node is not None
    raise_open_files(-(-addon.node.settings.max_concurrent_clients // workers))
    registry.register(addon.node.figures)
    ops: OpsServer | None = None
    if parent is not None:
        metrics_port = parent.share.metrics_port
    else:
        ops = _ops(registry, lambda: missing, arguments.metrics_port)
        metrics_port = ops.port
    addon.node.parts.own_door.protect(Endpoint("localhost", metrics_port), "own metrics")

    def serving() -> None:
        missing.clear()
        assert addon.node is not None
        node, trusted = addon.node, str(certificate(master.options.confdir))
        if parent is not None:
            parent.report(Serving(node.journal.node, trusted))
        else:
            _announce(node.listening(), f"node {node.journal.node}", trusted, metrics_port)

    try:
        collect_seldom()
        await master.serve(stop, serving)
    finally:
        if ops is not None:
            ops.close()


def collect_seldom() -> None:
    """To be called before the first client: what was made until then stays, and collections need not look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(BUSY_OBJECTS, 10, 10)


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


def _ops(registry: CollectorRegistry, ready: Ready, port: int) -> OpsServer:
    try:
        return OpsServer(registry, ready, port=port)
    except OSError as error:
        raise ConfigurationError(
            f"metrics port {port} cannot be bound ({error.strerror}); try --metrics-port 0"
        ) from None


def _announce(listening: str, who: str, trusted: str, metrics_port: int) -> None:
    sys.stdout.write(
        f"megido capture: proxy on {listening}, {who}, certificate {trusted}, metrics on 127.0.0.1:{metrics_port}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
