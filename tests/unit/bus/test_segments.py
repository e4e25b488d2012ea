"""The record codec against every kind of damage to one byte."""

import random

import pytest

from megido_shared.bus.local.segments import OVERHEAD, Damage, Entry, Name, pack, scan

NAME = Name("megido.flows", 0, 0, "0123456789abcdef0123456789abcdef")
VALUES = [b"", b"first", bytes(range(256)), b"x" * 500, b"last"]


def segment() -> bytes:
    return b"".join(pack(NAME.marker, b"key", value, n) for n, value in enumerate(VALUES))


def entries(data: bytes) -> list[tuple[int, bytes, bytes]]:
    return [(item.seq, item.key, item.value) for item in scan(data, NAME.marker) if isinstance(item, Entry)]


EXPECTED = [(n, b"key", value) for n, value in enumerate(VALUES)]


def test_a_name_says_everything_and_is_read_back() -> None:
    name = Name("t-1_x.y", 12, 34, "ab" * 16)
    assert Name.parse(name.file) == name
    assert len(name.marker) == 8
    assert name.marker != Name("t-1_x.y", 13, 34, "ab" * 16).marker


@pytest.mark.parametrize("file", ["lock", ".hidden", "a.log", "a.b.c.d.log", "a.1.2.zz.log", "a/b.1.2.ab.log", ""])
def test_other_files_are_no_segments(file: str) -> None:
    assert Name.parse(file) is None


def test_what_was_packed_is_found_again() -> None:
    assert entries(segment()) == EXPECTED


def test_each_flipped_byte_costs_exactly_the_record_that_it_lies_in() -> None:
    data = segment()
    bounds = [item for item in scan(data, NAME.marker) if isinstance(item, Entry)]
    for at in range(len(data)):
        for bit in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= bit
            items = list(scan(bytes(damaged), NAME.marker))
            hit = next(n for n, entry in enumerate(bounds) if entry.start <= at < entry.end)
            assert entries(bytes(damaged)) == EXPECTED[:hit] + EXPECTED[hit + 1 :], f"byte {at} ^ {bit:#x}"
            gaps = [item for item in items if isinstance(item, Damage)]
            assert gaps == [Damage(bounds[hit].start, bounds[hit].end, "corrupt")], f"byte {at} ^ {bit:#x}"


def test_each_cut_of_the_last_record_is_torn() -> None:
    data = segment()
    last = OVERHEAD + len(b"key") + len(VALUES[-1])
    for cut in range(1, last):
        items = list(scan(data[:-cut], NAME.marker))
        assert [item for item in items if isinstance(item, Damage)] == [
            Damage(len(data) - last, len(data) - cut, "torn")
        ]
        assert entries(data[:-cut]) == EXPECTED[:-1]


def test_two_damaged_neighbours_are_two_gaps() -> None:
    data = bytearray(segment())
    bounds = [item for item in scan(bytes(data), NAME.marker) if isinstance(item, Entry)]
    data[bounds[1].end - 1] ^= 1
    data[bounds[2].end - 1] ^= 1
    gaps = [item for item in scan(bytes(data), NAME.marker) if isinstance(item, Damage)]
    assert [(gap.start, gap.end) for gap in gaps] == [(bounds[n].start, bounds[n].end) for n in (1, 2)]


def test_noise_never_makes_a_record() -> None:
    rng = random.Random(20)
    for _ in range(200):
        noise = rng.randbytes(rng.randrange(1, 400))
        assert entries(noise) == []
        assert entries(segment() + noise) == EXPECTED
