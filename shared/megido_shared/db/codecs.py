"""How bytes are stored: headers and bodies compressed by us, with a first byte that names the coding.

Postgres' own compression of wide values is what makes inserts slow, and not every build has lz4 or zstd.
"""

import threading
from pathlib import Path

import zstandard

RAW = 0
ZSTD = 1
HEADERS_1 = 2
"""zstd with `headers-1.zdict`. A new dictionary is a new file and a new coding; rows of the old one stay readable."""

LEVEL = 1
_MIN_TO_COMPRESS = 200
_COMPRESSED = (b"\x1f\x8b", b"\x89PNG", b"\xff\xd8\xff", b"PK\x03\x04", b"wOF2", b"GIF8", b"\x28\xb5\x2f\xfd")
"""How data begins that would not become smaller: gzip, PNG, JPEG, zip, WOFF2, GIF, zstd."""
_MAX_STORED = 1 << 30


_HEADERS_1 = Path(__file__).with_name("headers-1.zdict").read_bytes()


class _Thread(threading.local):
    """A compressor is not thread-safe, and making one costs seven times what compressing 2 KB does."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        dictionary = zstandard.ZstdCompressionDict(_HEADERS_1)
        dictionary.precompute_compress(LEVEL)
        self.headers = zstandard.ZstdCompressor(level=LEVEL, dict_data=dictionary, write_dict_id=False)
        self.headers_1 = zstandard.ZstdDecompressor(dict_data=dictionary)


_thread = _Thread()


def pack(data: bytes) -> bytes:
    """One coding byte and the data, zstd when that is smaller. Not for the proxy's loop: 10–20 µs a KB."""
    if len(data) >= _MIN_TO_COMPRESS and not data.startswith(_COMPRESSED):
        compressed = _thread.compressor.compress(data)
        if len(compressed) < len(data):
            return b"\x01" + compressed
    return b"\x00" + data


def pack_headers(data: bytes) -> bytes:
    """`pack` for the MessagePack slice of headers: a third of the size and of the time."""
    compressed = _thread.headers.compress(data)
    return b"\x02" + compressed if len(compressed) < len(data) else b"\x00" + data


def plain(data: bytes) -> bytes:
    """`pack` without trying to compress."""
    return b"\x00" + data


def unpack(stored: bytes) -> bytes:
    """The inverse of every `pack`. Raises ValueError on what no `pack` made: an unknown coding byte, damaged data."""
    try:
        match stored[:1]:
            case b"\x00":
                return stored[1:]
            case b"\x01":
                return zstandard.ZstdDecompressor().decompress(stored[1:], max_output_size=_MAX_STORED)
            case b"\x02":
                return _thread.headers_1.decompress(stored[1:], max_output_size=_MAX_STORED)
    except zstandard.ZstdError as error:
        raise ValueError(f"a stored value is damaged: {error}") from error
    raise ValueError(f"unknown coding {stored[0]} of a stored value" if stored else "a stored value is empty")
