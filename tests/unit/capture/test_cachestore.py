"""What the cache holds: bounded in bytes, least recently used first; and the age of a response as hishel reckons it."""

import tracemalloc
from email.utils import formatdate, parsedate_to_datetime

import hishel
import pytest

from megido_capture.cache.store import VARIANTS, Store, Stored, dated, entry, view

NOW = 1_700_000_000.0


def stored(url: str, size: int = 100, **headers: str) -> Stored:
    made = entry(hishel.Request("GET", url), hishel.Headers(headers))
    return Stored(made, (), b"HTTP/1.1", b"OK", bytes(size))


def test_the_least_recently_used_goes_first() -> None:
    store = Store(3 * stored("a").size)
    for url in ("a", "b", "c"):
        store.add(stored(url))
    assert store.get("a")
    store.add(stored("d"))
    assert [url for url in "abcd" if url in store] == ["a", "c", "d"] and store.size == store.capacity


def test_one_that_is_larger_than_everything_drives_nothing_out() -> None:
    store = Store(10_000)
    store.add(stored("a"))
    store.add(stored("b", 20_000))
    assert "a" in store and "b" not in store


def test_variants_of_a_url_are_bounded_and_newest_last() -> None:
    store = Store()
    made = [stored("a", 100 + number) for number in range(VARIANTS + 3)]
    for item in made:
        store.add(item)
    assert store.get("a") == made[3:] and store.size == sum(item.size for item in made[3:])


def test_what_is_removed_is_not_counted_any_more() -> None:
    store = Store()
    first, second = stored("a"), stored("a")
    store.add(first)
    store.add(second)
    store.remove(first)
    store.remove(first)
    assert store.get("a") == [second] and store.size == second.size
    store.remove(second)
    assert "a" not in store and store.size == 0


def test_headers_count_as_what_they_take() -> None:
    """A client and a server together must not fill the memory with responses of nothing but header fields."""

    def of(number: int) -> Stored:
        fields = tuple((b"X-%d-%d" % (number, index), b"%d" % (number + index)) for index in range(300))
        made = entry(hishel.Request("GET", f"http://x/{number}", hishel.Headers({"Cookie": "a" * 999})), view(fields))
        return Stored(made, fields, b"HTTP/1.1", b"OK", b"")

    store = Store()
    of(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(50):
            store.add(of(number))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= store.size < 3 * taken


def http_date(seconds: float) -> bytes:
    return formatdate(seconds, usegmt=True).encode()


@pytest.mark.parametrize(
    ("date", "age", "expected"),
    [
        (NOW - 10, None, 10),
        (NOW - 10, b"30", 30),  # a server's clock that is ahead, or a cache's word
        (NOW - 30, b"10", 30),
        (NOW + 500, None, 0),
        (None, None, 0),
        (None, b"20", 20),
        (NOW - 10, b"nonsense", 10),
    ],
)
def test_initial_age(date: float | None, age: bytes | None, expected: int) -> None:
    fields = [(b"Expires", http_date((NOW if date is None else date) + 100))]
    fields += [(b"Date", http_date(date))] if date is not None else []
    fields += [(b"Age", age)] if age is not None else []
    headers = dated(tuple(fields), NOW)
    begun = parsedate_to_datetime(headers["date"]).timestamp()
    assert begun == NOW - expected
    assert parsedate_to_datetime(headers["expires"]).timestamp() - begun == 100  # the lifetime stays


def test_dates_that_are_none() -> None:
    headers = dated(((b"Date", b"Sun, 99 Foo 99999 99:99:99 GMT"), (b"Expires", b"0")), NOW)
    assert parsedate_to_datetime(headers["date"]).timestamp() == NOW and headers["expires"] == "0"


def test_view_keeps_duplicates_and_bytes() -> None:
    headers = view(((b"Vary", b"A"), (b"vary", b"B"), (b"X", b"\xff")))
    assert headers.get_list("vary") == ["A", "B"] and headers["x"].encode("latin-1") == b"\xff"
