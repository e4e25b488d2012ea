"""`flows.detail`: what a list never filters by, in one MessagePack map. Additive changes only."""

import msgspec
from msgspec import Struct

from megido_shared.events import NO_PEER, NO_TIMING, AnyFlow, Peer, Timing


class Detail(Struct, omit_defaults=True, frozen=True):
    client: Peer = NO_PEER
    server: Peer = NO_PEER
    timing: Timing = NO_TIMING
    rules: tuple[int, ...] = ()
    error_message: str = ""
    """A posted response's `error_message`, beside a status."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Detail)


def detail_of(event: AnyFlow) -> bytes:
    return _encoder.encode(
        Detail(
            client=event.client,
            server=event.server,
            timing=event.timing,
            rules=event.rules,
            error_message=getattr(event, "error_message", ""),
        )
    )


def decode_detail(stored: bytes) -> Detail:
    """Raises msgspec.DecodeError or ValidationError on other bytes."""
    return _decoder.decode(stored)
