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
    lossy: tuple[str, ...] = ()
    """Names of the text columns that do not say exactly what was on the wire (invalid UTF-8, NUL, too long for an
    index). Of `url` the bytes are in `target`, of `user_agent` in the headers, of the rest in `original`."""
    original: dict[str, bytes] = {}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Detail)


def detail_of(event: AnyFlow, original: dict[str, bytes] | None = None, lossy: tuple[str, ...] = ()) -> bytes:
    return _encoder.encode(
        Detail(
            client=event.client,
            server=event.server,
            timing=event.timing,
            rules=event.rules,
            error_message=getattr(event, "error_message", ""),
            lossy=lossy,
            original=original or {},
        )
    )


def decode_detail(stored: bytes) -> Detail:
    """Raises msgspec.DecodeError or ValidationError on other bytes."""
    return _decoder.decode(stored)
