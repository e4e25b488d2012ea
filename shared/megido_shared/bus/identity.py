"""The id of an encoded event, without decoding the rest of it."""

import msgspec


class _Identity(msgspec.Struct):
    event_id: bytes = b""


_decoder = msgspec.msgpack.Decoder(_Identity)


def event_id_of(value: bytes) -> bytes:
    """Empty when the bytes are no event."""
    try:
        return _decoder.decode(value).event_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b""
