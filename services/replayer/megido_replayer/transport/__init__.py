"""HTTP/1 that keeps the bytes: the sender, and what goes in and comes out of it."""

from megido_replayer.transport.messages import (
    SAFE_METHODS,
    Interim,
    Origin,
    RawRequest,
    RawResponse,
    SendError,
    Unsendable,
)
from megido_replayer.transport.sender import Sender
from megido_replayer.transport.tls import TlsContexts

__all__ = [
    "SAFE_METHODS",
    "Interim",
    "Origin",
    "RawRequest",
    "RawResponse",
    "SendError",
    "Sender",
    "TlsContexts",
    "Unsendable",
]
