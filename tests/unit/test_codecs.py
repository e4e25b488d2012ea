import random

import pytest

from megido_shared.db import codecs

NOISE = random.Random(1).randbytes(5000)


@pytest.mark.parametrize("data", [b"", b"\x00", bytes(range(256)), b"abc" * 10_000, NOISE, b"x" * 199, b"x" * 200])
def test_stored_bytes_come_back(data: bytes) -> None:
    assert codecs.unpack(codecs.pack(data)) == data


def test_what_repeats_is_compressed_and_noise_is_not() -> None:
    assert len(codecs.pack(b"abc" * 10_000)) < 100
    assert codecs.pack(NOISE) == b"\x00" + NOISE


def test_an_unknown_coding_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown coding 9"):
        codecs.unpack(b"\x09abc")
