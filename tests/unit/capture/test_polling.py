"""What a poll of the API leaves behind."""

import gc
import socket
import ssl
from collections.abc import Iterator

import httpx
import pytest

from megido_capture.configuration import source as configsource


@pytest.fixture
def nothing_listens() -> Iterator[str]:
    with socket.socket() as bound:  # bound and not listening: connects are refused
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


def test_polls_share_one_tls_context(nothing_listens: str) -> None:
    """Each would hold 0.7 MB until a collection, and a quiet node collects once in many minutes."""
    gc.disable()
    try:
        poll(nothing_listens)
        known = contexts()  # held, so that no new one gets the place of one that other tests left behind
        for _ in range(3):
            poll(nothing_listens)
        assert [found for found in contexts() if not any(found is one for one in known)] == []
    finally:
        gc.enable()


def poll(url: str) -> None:
    with pytest.raises(httpx.ConnectError):
        configsource.fetch(url.rstrip("/"), "browser", "capture-0", {})


def contexts() -> list[ssl.SSLContext]:
    # `type`, not `isinstance`: the latter asks the target of each weak proxy, which may be gone.
    return [found for found in gc.get_objects() if issubclass(type(found), ssl.SSLContext)]
