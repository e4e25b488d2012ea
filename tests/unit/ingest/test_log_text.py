"""Bodies of log files: what hostile ones may cost."""

import zstandard

from megido_ingest.jsonlogs.text import body_fields


def _body(data: bytes) -> dict[str, object]:
    return body_fields(data, [(b"Content-Encoding", b"zstd")], size=len(data), sha256=None, truncated=False)


def _compressed(window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(b"text") + compressor.flush()


def test_a_window_within_the_http_limit_is_decoded() -> None:
    assert _body(_compressed(23))["body"] == "text"


def test_a_larger_window_is_shown_as_it_crossed_the_wire() -> None:
    """RFC 9659: no more than 8 MB; the decoder would take that much memory at the frame's word."""
    assert _body(_compressed(27))["body_encoding"] == "base64"
