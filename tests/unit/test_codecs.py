import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from megido_shared import events
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


@pytest.mark.parametrize(
    "stored", [b"", b"\x01", b"\x01abc", b"\x02abc", codecs.pack(b"abc" * 1000)[:-3], codecs.pack(b"abc" * 1000)[:1]]
)
def test_a_damaged_value_is_a_value_error(stored: bytes) -> None:
    with pytest.raises(ValueError, match="stored value"):
        codecs.unpack(stored)


PAIRS = [
    (b"Host", b"api.example.com"),
    (b"User-Agent", b"Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"),
    (b"Accept-Encoding", b"gzip, deflate, br"),
    (b"X-Odd", b"\xff\x00"),
]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"\x90", NOISE, bytes(range(256)), *(bytes(events.pack_headers(PAIRS * n)) for n in (1, 20, 3000))],
)
def test_stored_headers_come_back(data: bytes) -> None:
    assert codecs.unpack(codecs.pack_headers(data)) == data


def test_short_headers_are_compressed_too() -> None:
    data = bytes(events.pack_headers(PAIRS))
    assert len(codecs.pack_headers(data)) < len(data) / 2 < len(codecs.pack(data))


def test_noise_in_headers_is_stored_as_it_is() -> None:
    assert codecs.pack_headers(NOISE) == b"\x00" + NOISE


@pytest.mark.parametrize(
    ("stored", "data"),
    [
        ("0061", b"a"),
        ("0128b52ffd6040007d0000406162636465666768010035530b17", b"abcdefgh" * 40),
        (
            "0228b52ffd209f05020024020f6170692e6578616d706c5541463b2072763a3132320f4105582d4f6464c402ff000bfc8d4c5b0849cfca7e67f95669181cc6dacf925c099463aba583ca",
            bytes(events.pack_headers(PAIRS)),
        ),
    ],
)
def test_what_was_stored_before_is_still_read(stored: str, data: bytes) -> None:
    """Never change these: rows hold them."""
    assert codecs.unpack(bytes.fromhex(stored)) == data


def test_threads_do_not_share_a_compressor() -> None:
    slices = [bytes(events.pack_headers([*PAIRS, (b"N", str(n).encode())])) for n in range(2000)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda data: codecs.unpack(codecs.pack_headers(data)), slices)) == slices
