"""The addon that mitmdump, mitmproxy, mitmweb and our own master load: options, and a node made from them."""

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mitmproxy import addonmanager, ctx, exceptions, optmanager
from mitmproxy.addons.core import CONF_DIR
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.proxy import mode_specs

from megido_capture import authority
from megido_capture.access.authentication import check_listeners
from megido_capture.configuration.live import Start
from megido_capture.configuration.settings import CONFIGURED, NAMES, CaptureSettings, defaults_from_env, option_of
from megido_capture.node import Node, Place
from megido_capture.stopping import STOP, Budget
from megido_shared.config_fields import FIELDS
from megido_shared.errors import ConfigurationError, MegidoError
from megido_shared.settings import common_from_env

logger = logging.getLogger(__name__)

HELP = {
    **{option_of(name): FIELDS[name].help for name in CONFIGURED},
    "api_url": "Base URL of Megido's API; without Kafka and without a local ingest the journal is posted there.",
    "source_app": "What the traffic is recorded under (browser, scanner, ...).",
    "auth_token": FIELDS["auth_token"].help + " Better: PROXY_AUTH_TOKEN.",
    "auth_password": FIELDS["auth_password"].help + " Better: PROXY_AUTH_PASSWORD.",
    "cache_ttl": "Seconds after which the configuration is read again.",
    "journal_cap": "Size on disk (like 512MiB) of what is recorded and not stored or shipped yet.",
    "journal_policy": "At the cap: drop_newest records no more, block lets new requests wait for room.",
    "journal_wait": "Seconds that a request may wait with journal_policy block; then it goes on unrecorded.",
    "allow_open_proxy": "Allow to listen on other addresses than loopback without authentication.",
}
_PLACE: tuple[tuple[str, Any, str], ...] = (
    ("megido_data_dir", "", "Data directory. Default: MEGIDO_DATA_DIR, or the XDG data home."),
    ("megido_kafka", "", "Kafka bootstrap servers (host:port). Default: MEGIDO_KAFKA, or no Kafka."),
    ("megido_node", "capture", "Name of this node; its slot in the data directory is the name and a number."),
    ("megido_forwarder", True, "Ship the journal to Kafka or to api_url by a child process."),
    ("megido_protect", "", "Further endpoints (host:port, comma-separated) that nobody reaches through the proxy."),
)
_FIXED = ("api_url", "source_app", "journal_policy", *(name for name, _, _ in _PLACE))
"""What a running node cannot change: a new value is refused, not taken without effect."""
_LISTENING = {"mode", "listen_host", "validate_inbound_headers"}


class MegidoAddon:
    """Under `mitmdump -s` the node is made in the first `configure` (the listener is up before `running`); our own
    master calls `begin` itself, so that an error reaches its user as one line."""

    name = "megido"

    def __init__(
        self,
        env: Mapping[str, str] = os.environ,
        *,
        hosted: bool = True,
        workers: int = 1,
        stop_seconds: float = STOP,
    ) -> None:
        self.node: Node | None = None
        self.addons: list[Any] = []
        self._env = env
        self._hosted = hosted
        self._workers = workers
        self._stop_seconds = stop_seconds
        self._stop: Budget | None = None
        self._rebind = False
        self._begun = False
        self._fixed: dict[str, Any] = {}
        self._given: set[str] = set()

    def load(self, loader: addonmanager.Loader) -> None:
        defaults = self._defaults()
        for name in NAMES:
            default = defaults.get(name, getattr(CaptureSettings(), name))
            loader.add_option(name, type(default), default, HELP[name])
        for name, default, text in _PLACE:
            loader.add_option(name, type(default), default, text)
        if self._hosted:
            self._check_deferred(loader.master.options)

    def configure(self, updated: set[str]) -> None:
        if self.node is not None:
            if updated & {*NAMES, *_FIXED, *_LISTENING}:
                self._reconfigure(updated)
            if "ssl_insecure" in updated:
                self._warn_insecure()
        elif self._hosted and not self._begun:
            try:
                self.begin()
            except MegidoError as error:
                self._refuse(str(error))

    def begin(self) -> None:
        """Makes the node from the options. Raises ConfigurationError."""
        self._begun = True  # setting an option below calls `configure` again
        options, settings = ctx.options, self._settings()
        _check_validating()
        check_listeners(settings, options.mode, options.listen_host)
        self._given = self._given_of(set(NAMES))
        common = common_from_env(self._env, data_dir=options.megido_data_dir, kafka=options.megido_kafka)
        common.data_dir.ensure()
        if options.confdir == CONF_DIR:
            authority.ensure(common.data_dir.ca, options.key_size)
            options.update(confdir=str(common.data_dir.ca))
        unbound = _without_host(options.mode, options.listen_host)
        if unbound and not self._hosted:
            options.update(listen_host="127.0.0.1")
        self._rebind = self._hosted and unbound
        place = Place(
            common=common,
            name=options.megido_node,
            forwarder=options.megido_forwarder,
            loopback_only=self._rebind,
            workers=self._workers,
            protect=options.megido_protect or self._env.get("MEGIDO_PROTECT", ""),
            stop_seconds=self._stop_seconds,
        )
        proxyserver = ctx.master.addons.get("proxyserver")
        assert isinstance(proxyserver, Proxyserver)
        self.node = Node(
            Start(settings, frozenset(self._given)),
            place,
            proxyserver,
            check=self._check,
            ssl_insecure=lambda: bool(ctx.options.ssl_insecure),
        )
        self._warn_insecure()
        self.addons = self.node.addons
        _put_behind_us("upstreamauth")
        self._fixed = {name: getattr(options, name) for name in _FIXED}

    def running(self) -> None:
        if self.node is None:
            return
        if self._hosted:
            authority_file = certificate(ctx.options.confdir)
            logger.info("megido records here as %s; clients must trust %s", self.node.journal.node, authority_file)
        if self._rebind:
            # listen_host was read before a script could set it; a changed mode is bound anew.
            ctx.options.update(mode=[_on_loopback(mode, ctx.options.listen_port) for mode in ctx.options.mode])
        self.node.start()

    def begin_stop(self) -> Budget | None:
        """From now on its seconds count. None: there is nothing to stop."""
        if self.node is not None and self._stop is None:
            self._stop = self.node.budget()
        return self._stop

    async def end_connections(self) -> None:
        """Nobody new is served, and who is idle is let go."""
        if self.node is not None:
            await self.node.end_connections()
            self.addons = self.node.addons

    async def drain(self, budget: Budget, hurry: asyncio.Event | None = None) -> None:
        """See `Node.drain`."""
        if self.node is not None:
            await self.node.drain(budget, hurry)

    async def done(self) -> None:
        budget = self.begin_stop()
        if budget is not None and self._hosted:
            await self.end_connections()
            await self.drain(budget)
        node, self.node = self.node, None
        if node is not None and budget is not None:
            await node.stop(budget)

    def _defaults(self) -> dict[str, Any]:
        try:
            return defaults_from_env(self._env)
        except ConfigurationError as error:
            if not self._hosted:
                raise
            self._refuse(str(error))
            return {}

    def _check_deferred(self, options: optmanager.OptManager) -> None:
        """Values from `--set` are converted after `load`, where mitmproxy loses the error and serves without us."""
        for name in [name for name in options.deferred if name in options]:
            value = options.deferred[name]
            try:
                if isinstance(value, optmanager._UnconvertedStrings):
                    options._parse_setval(options._options[name], value.val)
            except exceptions.OptionsError as error:
                del options.deferred[name]
                self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        """Logged, not raised: mitmproxy would print a trace, and an error while it starts ends it anyway."""
        self._begun = True
        self.addons = [_Closed()]
        logger.error("megido: %s", reason)

    def _settings(self) -> CaptureSettings:
        return CaptureSettings(**{name: getattr(ctx.options, name) for name in NAMES}).checked()

    def _given_of(self, names: set[str]) -> set[str]:
        """Those of the options that a user or a variable set, to their default too. (mitmproxy forgets the latter when
        it rolls back a change, so what was given once stays given.)"""
        options = ctx.options._options
        explicit = {name for name in names if name in NAMES and options[name].value is not optmanager.unset}
        return self._given | explicit | self._defaults().keys()

    def _check(self, settings: CaptureSettings) -> None:
        """Raises ConfigurationError on settings that would open or close the listeners wrongly."""
        options = ctx.options
        check_listeners(settings, options.mode, options.listen_host)
        if self.node is not None and not self.node.parts.gate.loopback_only and not settings.auth_required:
            # Only the listeners of the start are bound to loopback by us.
            check_listeners(settings, options.mode, options.listen_host or "0.0.0.0")  # noqa: S104

    def _reconfigure(self, updated: set[str]) -> None:
        assert self.node is not None
        options = ctx.options
        try:
            if changed := [name for name, value in self._fixed.items() if getattr(options, name) != value]:
                raise ConfigurationError(f"{changed[0]} cannot be changed while the proxy runs; start it anew")
            _check_validating()
            given = self._given_of(updated)
            self.node.restart(Start(self._settings(), frozenset(given)))
        except ConfigurationError as error:
            raise exceptions.OptionsError(str(error)) from error
        self._given = given

    def _warn_insecure(self) -> None:
        if ctx.options.ssl_insecure:
            logger.warning("ssl_insecure is set: certificates of servers are not verified")


def _check_validating() -> None:
    """Raises ConfigurationError when mitmproxy would let requests through that smuggle others."""
    if not ctx.options.validate_inbound_headers:
        raise ConfigurationError("validate_inbound_headers cannot be switched off: it stops request smuggling")


def _put_behind_us(name: str) -> None:
    """An addon that writes the upstream proxy's credentials where we look for the client's."""
    addons = ctx.master.addons
    found = addons.get(name)
    if found is not None:
        # A new list: this may be called while mitmproxy walks the old one.
        addons.chain = [*(addon for addon in addons.chain if addon is not found), found]


class _Closed:
    """Stands where the node could not be made: until the process has ended, nobody is served."""

    name = "megido-closed"

    def client_connected(self, client: Any) -> None:
        client.error = "Megido could not start"


def _without_host(modes: list[str], listen_host: str) -> bool:
    return any(_is_unbound(mode_specs.ProxyMode.parse(mode), listen_host) for mode in modes)


def _is_unbound(mode: mode_specs.ProxyMode, listen_host: str) -> bool:
    listens = mode.listen_port(0) is not None and not isinstance(mode, mode_specs.WireGuardMode)
    return listens and mode.listen_host(listen_host) == ""


def _on_loopback(text: str, listen_port: int | None) -> str:
    mode = mode_specs.ProxyMode.parse(text)
    if not _is_unbound(mode, ""):
        return text
    head = text.rpartition("@")[0] if mode.custom_listen_port is not None else text
    return f"{head}@127.0.0.1:{mode.listen_port(listen_port)}"


def certificate(confdir: str) -> Path:
    """What clients must trust."""
    return Path(confdir).expanduser() / f"{authority.BASENAME}-ca-cert.pem"
