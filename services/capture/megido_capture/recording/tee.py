"""A body that passes through without being held: stored part, true size and hash on the way."""

from collections.abc import Callable, Iterable
from hashlib import sha256

from megido_shared.events import Body

type Stream = Callable[[bytes], Iterable[bytes] | bytes]
type Append = Callable[[int, bytes], object]
"""Appends chunk `index` to the journal."""


def _nothing(index: int, data: bytes) -> None:
    pass


class Tee:
    """A `stream` callable for mitmproxy. What it is given goes to the journal first and then on, unchanged.

    `expected` is the declared length: when that much has passed, `completed` is called before the completing
    piece is handed over, because with Content-Length the peer has everything once it has that piece. `passing` is
    called for every piece, also for what lies above the cap.
    """

    def __init__(
        self,
        append: Append,
        cap: int,
        *,
        failed: Callable[[Exception], None],
        expected: int | None = None,
        completed: Callable[[], None] | None = None,
        inner: Stream | None = None,
        passing: Callable[[], None] | None = None,
    ) -> None:
        self._append = append
        self._cap = cap
        self._failed = failed
        self._expected = expected
        self._completed = completed
        self._inner = inner
        self._passing = passing
        self._hash = sha256()
        self.size = 0
        self.stored = 0
        self.chunks = 0
        self.ended = False
        self.closed = False

    def __call__(self, data: bytes) -> Iterable[bytes] | bytes:
        """`data` is b"" at the body's end (mitmproxy's convention)."""
        try:
            self._take(data)
        except Exception as error:  # noqa: BLE001 - the body must go on whatever happens to its copy
            self._failed(error)
        return data if self._inner is None else self._inner(data)

    def _take(self, data: bytes) -> None:
        if self.closed:
            return
        if not data:
            self.ended = True
            return
        if self._passing is not None:
            self._passing()
        self.size += len(data)
        self._hash.update(data)
        room = self._cap - self.stored
        if room > 0:
            kept = data if len(data) <= room else data[:room]
            self.stored += len(kept)
            index, self.chunks = self.chunks, self.chunks + 1
            self._append(index, kept)
        if self._expected is not None and self.size >= self._expected:
            self.ended = True
            if self._completed is not None:
                self._completed()

    def close(self) -> None:
        """The terminal event has been written: what still passes only passes. Lets go of all that it called, which
        holds the flow that holds this."""
        self.closed = True
        self._append, self._passing, self._completed = _nothing, None, None

    def body(self) -> Body:
        """What has passed so far."""
        return Body(
            size=self.size,
            sha256=self._hash.digest() if self.size else b"",
            chunks=self.chunks,
            truncated=self.stored < self.size,
        )
