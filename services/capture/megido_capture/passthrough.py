"""The addon that leaves TLS to some hosts alone: their clients pin a certificate and would refuse ours."""

import logging
from collections.abc import Callable

from mitmproxy import connection, tls
from mitmproxy.proxy.context import Context

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_shared.hostpatterns import HostPatterns, plain

logger = logging.getLogger(__name__)

MAX_NAMED = 200
"""Hosts that the log names; further ones are only counted."""


class PassThrough:
    """A tunnel to a host on the list is neither decrypted nor recorded; access control and limits hold as for others.

    Decided on the client's hello: by the host of CONNECT, the name in the hello, and the address connected to.
    """

    name = "megido-passthrough"

    def __init__(
        self, settings: CaptureSettings, counters: Counters, *, begun: Callable[[connection.Client], None]
    ) -> None:
        """`begun` is told of each tunnel: mitmproxy has no hook for it."""
        self.counters = counters
        self._begun = begun
        self._named: set[str] = set()
        self.apply(settings)

    def apply(self, settings: CaptureSettings) -> None:
        self._hosts = HostPatterns(settings.passthrough_hosts)

    @contained
    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        if self._hosts.empty or data.ignore_connection:
            return
        hosts, port = _destination(data.context, data.client_hello.sni)
        if self._hosts.match(hosts, port):
            data.ignore_connection = True
            self.counters["passed_through"] += 1
            self._begun(data.context.client)
            self._say(hosts[0])

    def _say(self, host: str) -> None:
        name = plain(host)
        if name not in self._named and len(self._named) < MAX_NAMED:
            self._named.add(name)
            logger.info("TLS to %s passes through unrecorded (passthrough_hosts)", name)


def _destination(context: Context, sni: str | None) -> tuple[list[str], int]:
    """Every name of the server, the best known first."""
    server = context.server
    address, peer = server.address or ("", 0), server.peername or ("", 0)
    hosts = [host for host in (sni, address[0], peer[0]) if host]
    return hosts, address[1] or peer[1]
