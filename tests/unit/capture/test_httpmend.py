"""The mended parts go in and come out; on an unknown version nothing is touched."""

from collections.abc import Iterator

import pytest
from mitmproxy import connection
from mitmproxy.proxy.layers.http import _http1

from megido_capture.mitm import http1 as httpmend


class Nobody:
    def bad_request(self, conn: connection.Client, message: str, target: tuple[str, int] | None) -> None:
        raise AssertionError(message)


def parts() -> list[object]:
    return [getattr(owner, name) for owner, name in httpmend._PLACES]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    httpmend.stop_mending()
    yield
    httpmend.stop_mending()


def test_it_can_be_put_in_twice_and_taken_out() -> None:
    before = parts()
    httpmend.mend(Nobody())
    httpmend.mend(Nobody())
    assert not set(map(id, before)) & set(map(id, parts()))
    httpmend.stop_mending()
    assert parts() == before


def test_what_another_put_over_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: object, event: object) -> None:
        raise AssertionError

    httpmend.mend(Nobody())
    monkeypatch.setattr(_http1.Http1Server, "read_headers", other)
    httpmend.stop_mending()
    assert _http1.Http1Server.read_headers is other
