"""A master with only what a capture node needs: nothing keeps flows, nothing prints them."""

import asyncio
import inspect
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from mitmproxy import addonmanager, exceptions, hooks, master, options
from mitmproxy.addons import core, disable_h2c, dns_resolver, next_layer, proxyserver, tlsconfig, upstream_auth
from mitmproxy.proxy import mode_specs
from mitmproxy.utils import asyncio_utils

from megido_capture.addon import MegidoAddon
from megido_capture.counters import uncontained
from megido_capture.mitm import fastpath
from megido_capture.onboarding import Onboarding
from megido_shared.errors import ConfigurationError

logger = logging.getLogger(__name__)


type Function = tuple[Callable[..., Any], Callable[[Exception], None] | None]
"""What a hook calls, and what takes its errors instead of the log."""


class Dispatcher(addonmanager.AddonManager):
    """Calls exactly the functions that a hook has, found once; mitmproxy's own walks every addon for every hook."""

    def __init__(self, owner: master.Master) -> None:
        self._functions: dict[str, list[Function]] = {}
        super().__init__(owner)  # type: ignore[no-untyped-call]

    def add(self, *addons: object) -> None:
        super().add(*addons)  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """To be called when an addon has got or lost addons of its own, or has other `idle_hooks`."""
        self._functions = {}

    async def handle_lifecycle(self, event: hooks.Hook) -> None:
        (subject,) = event.args()
        pending = self.start(event.name, subject)
        if pending is not None:
            await pending

    def start(self, name: str, subject: Any) -> Awaitable[None] | None:
        """Calls the functions of a hook. What it returns is to be awaited before the hook has ended: the first that
        has something to wait for, and those behind it. None: all have ended."""
        functions = self._functions.get(name)
        if functions is None:
            functions = self._functions[name] = self._find(name)
        for index, (function, failed) in enumerate(functions):
            try:
                result = function(subject)
            except Exception as error:
                if failed is not None:
                    failed(error)
                elif isinstance(error, exceptions.AddonHalt):
                    return None
                else:
                    logger.exception("hook %s failed: %s", name, type(error).__name__)
                continue
            if result is not None and inspect.isawaitable(result):
                return self._go_on(name, subject, result, functions[index + 1 :])
        return None

    async def _go_on(self, name: str, subject: Any, result: Awaitable[Any], functions: list[Function]) -> None:
        for function, failed in ((None, None), *functions):
            try:
                result = result if function is None else function(subject)
                if result is not None and inspect.isawaitable(result):
                    await result
            except Exception as error:
                if failed is not None:
                    failed(error)
                elif isinstance(error, exceptions.AddonHalt):
                    return
                else:
                    logger.exception("hook %s failed: %s", name, type(error).__name__)

    def _find(self, name: str) -> list[Function]:
        """Without those of addons that say they have nothing to do in this hook (`idle_hooks`, a set of names): a call
        that only finds that out costs about 0.5 µs, and a usual configuration has six of them in each flow."""
        addons = (addon for top in self.chain for addon in addonmanager.traverse([top]))
        found = (getattr(addon, name, None) for addon in addons if name not in getattr(addon, "idle_hooks", ()))
        return [uncontained(function) for function in found if callable(function)]


def _second_signal() -> asyncio.Event:
    """Set by the next SIGTERM or SIGINT: whoever sends it does not want to wait."""
    hurry = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, hurry.set)
    return hurry


class CaptureMaster(master.Master):
    """`modes` decide which of mitmproxy's addons are needed beside the core ones."""

    def __init__(self, capture: MegidoAddon, modes: list[str], *, fast: bool = True) -> None:
        if fast:
            fastpath.replace_hot_spots()
        super().__init__(fastpath.Options() if fast else options.Options())
        self.addons = self.dispatcher = Dispatcher(self)
        self.capture = capture
        self.proxyserver = proxyserver.Proxyserver()
        self.addons.add(
            core.Core(),
            self.proxyserver,
            next_layer.NextLayer(),
            tlsconfig.TlsConfig(),
            disable_h2c.DisableH2C(),
            Onboarding(),
        )
        kinds = {type(mode_specs.ProxyMode.parse(mode)) for mode in modes}
        if kinds & {mode_specs.UpstreamMode, mode_specs.ReverseMode}:
            self.addons.add(upstream_auth.UpstreamAuth())
        if kinds & {mode_specs.WireGuardMode, mode_specs.DnsMode, mode_specs.LocalMode, mode_specs.TunMode}:
            self.addons.add(dns_resolver.DnsResolver())
        self.addons.add(capture)

    async def serve(self, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Listens, calls `ready`, and serves until `stop`; then no connection is accepted any more, idle ones are
        closed, and what is in use gets its time to end (`stopping`), unless a second signal comes. Raises
        ConfigurationError when a port cannot be bound."""
        with (
            asyncio_utils.install_exception_handler(self._asyncio_exception_handler),
            asyncio_utils.set_eager_task_factory(),
        ):
            if self.capture.node is not None:
                self.capture.node.in_force.told.append(self.dispatcher.forget)
                self.capture.node.parts.rule_set.replaced = self.dispatcher.forget
            self.dispatcher.forget()
            if not await self.proxyserver.setup_servers():
                raise ConfigurationError(self._why_not_listening())
            try:
                await self.running()
                ready()
                await stop.wait()
                await self._drain(_second_signal())
            finally:
                await self.done()

    async def _drain(self, hurry: asyncio.Event) -> None:
        if (budget := self.capture.begin_stop()) is not None:
            await self.capture.end_connections()
            self.dispatcher.forget()
            await self.capture.drain(budget, hurry)

    def _why_not_listening(self) -> str:
        for found in self.proxyserver.servers:
            if isinstance(found.last_exception, OSError):
                host = found.mode.listen_host(self.options.listen_host)
                port = found.mode.listen_port(self.options.listen_port)
                reason = os.strerror(found.last_exception.errno or 0).lower()
                return f"the proxy cannot listen on {host}:{port} ({reason}); choose another with --listen-port"
        return "the proxy cannot listen"
