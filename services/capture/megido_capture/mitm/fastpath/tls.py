"""TLS: what is sent together is encrypted together, and OpenSSL is asked only for what it has."""

from typing import Any

from mitmproxy.proxy import commands, events, tunnel
from mitmproxy.proxy.layer import CommandGenerator
from mitmproxy.proxy.layers import tls
from mitmproxy.proxy.tunnel import TunnelState
from OpenSSL import SSL

AT_MOST = 65_535
_pending: Any = getattr(SSL._lib, "BIO_ctrl_pending", None)  # type: ignore[attr-defined]


def replace() -> None:
    tunnel.TunnelLayer.event_to_child = _event_to_child  # type: ignore[method-assign]
    if _pending is not None:
        tls.TLSLayer.tls_interact = _tls_interact  # type: ignore[method-assign]


def _event_to_child(self: tunnel.TunnelLayer, event: events.Event) -> CommandGenerator[None]:
    """`TunnelLayer.event_to_child`: head and body that a layer sends one after the other become one record."""
    if self.tunnel_state is TunnelState.ESTABLISHING and not self.command_to_reply_to:
        self._event_queue.append(event)
        return
    pieces: list[bytes] = []
    for command in self.child_layer.handle_event(event):
        if type(command) is commands.SendData and command.connection is self.conn:
            pieces.append(command.data)
            continue
        if pieces:
            yield from self.send_data(b"".join(pieces))
            pieces.clear()
        yield from self._handle_command(command)
    if pieces:
        yield from self.send_data(b"".join(pieces))


def _tls_interact(self: tls.TLSLayer) -> CommandGenerator[None]:
    """`TLSLayer.tls_interact`, which reads until OpenSSL raises that there is no more."""
    while _pending(self.tls._from_ssl):
        yield commands.SendData(self.conn, self.tls.bio_read(AT_MOST))
