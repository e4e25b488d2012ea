"""uvicorn with what it lacks: bounded request heads, and signals left to us."""

from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


class HeadTooLarge(Exception):
    """The parser turns it into a 400."""


class Server(uvicorn.Server):
    """Signals are the caller's: uvicorn raises a captured one again at its end, which is no clean exit."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class BoundedHttpTools(HttpToolsProtocol):
    """httptools has no limit of its own on the request line and headers."""

    _head_bytes = 0

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, more: int) -> None:
        self._head_bytes += more
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge
