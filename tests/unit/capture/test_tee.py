"""The tee: everything goes on, the stored part and the true size and hash are right."""

from hashlib import sha256

import pytest

from megido_capture.recording.tee import Tee


def made(cap: int = 10, **more):  # type: ignore[no-untyped-def]
    kept: list[tuple[int, bytes]] = []
    errors: list[Exception] = []
    tee = Tee(lambda index, data: kept.append((index, data)), cap, failed=errors.append, **more)
    return tee, kept, errors


@pytest.mark.parametrize("pieces", [[b"12345"], [b"12345", b"67890"], [b"1", b"2345678901234", b"x" * 50], []])
def test_passes_everything_and_keeps_the_cap(pieces: list[bytes]) -> None:
    tee, kept, errors = made()
    assert b"".join(tee(piece) for piece in [*pieces, b""]) == b"".join(pieces)
    whole = b"".join(pieces)
    assert b"".join(data for _, data in kept) == whole[:10]
    assert [index for index, _ in kept] == list(range(len(kept)))
    body = tee.body()
    assert (body.size, body.truncated, body.chunks) == (len(whole), len(whole) > 10, len(kept))
    assert body.sha256 == (sha256(whole).digest() if whole else b"") and tee.ended and not errors


def test_completion_comes_before_the_completing_piece_is_handed_over() -> None:
    order: list[str] = []
    tee, _, _ = made(expected=4, completed=lambda: order.append("completed"))
    for piece in (b"ab", b"cd"):
        order.append(bytes(tee(piece)).decode())
    assert order == ["ab", "completed", "cd"]


def test_a_failing_journal_stops_nothing() -> None:
    def broken(index: int, data: bytes) -> None:
        raise OSError("disk full")

    errors: list[Exception] = []
    tee = Tee(broken, 10, failed=errors.append)
    assert tee(b"data") == b"data" and len(errors) == 1 and tee.body().size == 4


def test_another_addons_stream_function_goes_on_working() -> None:
    tee, kept, _ = made(inner=lambda data: [data.upper()])
    assert tee(b"abc") == [b"ABC"] and kept == [(0, b"abc")]


def test_every_piece_is_a_sign_of_life_also_above_the_cap() -> None:
    signs: list[int] = []
    tee, kept, _ = made(cap=1, passing=lambda: signs.append(1))
    for piece in (b"ab", b"cd", b"ef", b""):
        tee(piece)
    assert len(signs) == 3 and kept == [(0, b"a")]


def test_nothing_is_kept_after_the_end_was_written() -> None:
    tee, kept, _ = made()
    tee.closed = True
    assert tee(b"late") == b"late" and not kept
