"""What mitmproxy has chosen for a connection's next bytes, for those who need not know its layers."""

from mitmproxy.proxy import layer
from mitmproxy.proxy.layers import ClientTLSLayer, ServerTLSLayer, TCPLayer, UDPLayer


def is_tls(chosen: layer.Layer | None) -> bool:
    """Whether a TLS handshake has begun."""
    return isinstance(chosen, ClientTLSLayer | ServerTLSLayer)


def is_relay(chosen: layer.Layer | None) -> bool:
    """Whether bytes go through as they come."""
    return isinstance(chosen, TCPLayer | UDPLayer)
