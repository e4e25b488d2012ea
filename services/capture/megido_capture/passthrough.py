"""The addon that leaves TLS to some hosts alone: their clients pin a certificate and would refuse ours."""

import logging

from mitmproxy import tls
from mitmproxy.proxy import mode_specs
from mitmproxy.proxy.context import Context

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters, contained
from megido_shared.addresses import literal
from megido_shared.hostpatterns import HostPatterns, plain

logger = logging.getLogger(__name__)

MAX_NAMED = 200
"""Pairs of names that the log has; further ones are only counted."""


NAMED = (mode_specs.RegularMode, mode_specs.UpstreamMode)
"""Modes whose clients say where they want to go: by CONNECT."""


class PassThrough:
    """A tunnel to a host on the list is neither decrypted nor recorded; access control and limits hold as for others.

    Decided on the client's hello. The name in it (SNI) is what a client says, and where the tunnel leads is another
    matter: one that named a listed host there could take anything past the record. So where a client has said where it
    wants to go (CONNECT, a SOCKS request with a name), that must be listed, and so must the name in the hello if it is
    another. In reverse mode the server is the operator's own choice, and decides alone. Where all else is an address
    (transparent modes, a SOCKS request with an address), the name or the address must be.
    """

    name = "megido-passthrough"

    def __init__(self, settings: CaptureSettings, counters: Counters) -> None:
        self.counters = counters
        self._named: set[tuple[str, str]] = set()
        self.apply(settings)

    def apply(self, settings: CaptureSettings) -> None:
        self._hosts = HostPatterns(settings.passthrough_hosts)

    @contained
    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        if self._hosts.empty or data.ignore_connection:
            return
        server, sni = data.context.server, data.client_hello.sni or ""
        if server.address is None:
            return  # TLS with the proxy itself: it leads nowhere yet
        if self._is_listed(data.context, plain(server.address[0]), plain(sni), server.address[1]):
            data.ignore_connection = True
            self.counters["passed_through"] += 1
            self._say(plain(server.address[0]), plain(sni))

    def _is_listed(self, context: Context, host: str, sni: str, port: int) -> bool:
        mode = context.client.proxy_mode
        # Behind another proxy the other end is that one, wherever the tunnel leads.
        peer = context.server.peername[0] if context.server.peername and not context.server.via else ""
        leads = self._hosts.match((host, peer), port)
        if isinstance(mode, mode_specs.ReverseMode):
            return leads
        if isinstance(mode, NAMED) or (isinstance(mode, mode_specs.Socks5Mode) and literal(host) is None):
            return leads and (sni in ("", host) or self._hosts.match((sni,), port))
        return leads or self._hosts.match((sni,), port)

    def _say(self, host: str, sni: str) -> None:
        if (host, sni) not in self._named and len(self._named) < MAX_NAMED:
            self._named.add((host, sni))
            hello = "" if sni == host else f" (named {sni} in the client's hello)" if sni else " (unnamed in the hello)"
            logger.info("TLS to %s%s passes through unrecorded (passthrough_hosts)", host, hello)
