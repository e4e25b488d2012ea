"""What mitmproxy has chosen for a connection's next bytes, for those who need not know its layers."""

from mitmproxy.proxy import layer
from mitmproxy.proxy.layers import ClientTLSLayer, ServerTLSLayer, TCPLayer, UDPLayer


def is_tls(chosen: layer.Layer | None) -> bool:
    """Whether the client has begun a TLS handshake. The layer of the server's TLS stands in front of the client's, and
    in reverse mode in front of plain clients too."""
    if isinstance(chosen, ServerTLSLayer):
        chosen = chosen.child_layer
    return isinstance(chosen, ClientTLSLayer)


def is_relay(chosen: layer.Layer | None) -> bool:
    """Whether bytes go through as they come."""
    return isinstance(chosen, TCPLayer | UDPLayer)
