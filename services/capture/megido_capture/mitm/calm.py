"""What an HTTP/2 peer may cost beside what it transfers.

Neither h2 nor mitmproxy bounds it: frames that ask for work and carry nothing (PING, SETTINGS, PRIORITY, empty DATA:
CVE-2019-9512, -9513, -9515, -9518), streams that are opened and reset (rapid reset, CVE-2023-44487, and resets that we
are made to send, CVE-2025-8671), and frames and header blocks that are collected before they are found too large.
"""

import time
from typing import Any

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from h2.frame_buffer import FrameBuffer
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, SettingsFrame

FRAMES, FRAMES_RATE = 5_000.0, 100.0
"""Frames that carry nothing: at once, and a second after that. Each takes about ten microseconds."""

PER_TRANSFER = 4.0
"""Such frames that each request, and each frame of a body, allows beside: two windows opened, a ping, one more."""

RESETS, RESETS_RATE = 500.0, 33.0
"""Streams that end by a reset: at once, and a second after that. (Envoy allows 500, nghttp2 1,000 and 33 a second.)"""

SETTINGS_KEPT = 100
"""h2 remembers settings that it does not know, each with a few hundred bytes."""


class TooMuch(h2.exceptions.ProtocolError):
    """The connection ends with this."""

    error_code = h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


class BoundedFrames(FrameBuffer):
    """h2's buffer, which finds a frame too large when all of it has come (up to 16 MB), and counts the frames of a
    header block but not their bytes."""

    def __init__(self, *, server: bool, max_frame_size: int, max_block: int) -> None:
        super().__init__(server)
        self.max_frame_size = max_frame_size
        self._max_block = max_block

    def add_data(self, data: Any) -> None:
        super().add_data(data)
        held = self._data
        if len(held) > self.max_frame_size and int.from_bytes(held[:3]) > self.max_frame_size:
            raise h2.exceptions.FrameTooLargeError(f"a frame of more than {self.max_frame_size:,} bytes")
        if self._headers_buffer and sum(len(frame.data) for frame in self._headers_buffer) > self._max_block:
            raise h2.exceptions.DenialOfServiceError(f"more than {self._max_block:,} bytes in continuation frames")


class CalmFrames(BoundedFrames):
    """Of a client. Raises TooMuch when too many frames that carry nothing have come."""

    def __init__(self, **bounds: Any) -> None:
        super().__init__(server=True, **bounds)
        self._left = FRAMES
        self._resets_left = RESETS
        self._filled = self._resets_filled = time.monotonic()

    def reset(self) -> bool:
        """A stream was reset, by the client or for what it did. False: too many."""
        self._resets_left -= 1.0
        if self._resets_left < 0:
            now = time.monotonic()
            self._resets_left = min(self._resets_left + (now - self._resets_filled) * RESETS_RATE, RESETS)
            self._resets_filled = now
        return self._resets_left >= 0

    def sent(self) -> None:
        """A frame of a body goes to the client."""
        if self._left < FRAMES:
            self._left += PER_TRANSFER

    def _update_header_buffer(self, f: Any) -> Any:
        """Called with each frame."""
        kind = type(f)
        if kind is HeadersFrame or (kind is DataFrame and f.data):
            self.sent()
        elif kind is SettingsFrame:
            self._spend(1.0 + len(f.settings))
        elif kind is not ContinuationFrame and not (kind is DataFrame and "END_STREAM" in f.flags):
            self._spend(1.0)
        return super()._update_header_buffer(f)

    def _spend(self, amount: float) -> None:
        self._left -= amount
        if self._left < 0:
            now = time.monotonic()
            self._left = min(self._left + (now - self._filled) * FRAMES_RATE, FRAMES)
            self._filled = now
            if self._left < 0:
                raise TooMuch("too many frames that carry nothing")


def keep_calm(conn: h2.connection.H2Connection, *, client: bool, max_block: int) -> None:
    """Puts the bounds into a connection that has not begun. `client`: its peer is one of ours."""
    bounds = {"max_frame_size": conn.max_inbound_frame_size, "max_block": max_block}
    if not client:
        conn.incoming_buffer = BoundedFrames(server=False, **bounds)
        return
    conn.incoming_buffer = frames = CalmFrames(**bounds)
    send = conn.send_data

    def send_data(*args: Any, **how: Any) -> None:
        frames.sent()
        send(*args, **how)

    conn.send_data = send_data  # type: ignore[method-assign]


def excess(event: Any, conn: h2.connection.H2Connection) -> str:
    """What there is too much of with a client's event, or empty."""
    kind = type(event)
    if kind is TooMuch:
        return str(event)
    if kind is h2.events.StreamReset:
        calm = not isinstance(conn.incoming_buffer, CalmFrames) or conn.incoming_buffer.reset()
        return "" if calm else "too many streams that were reset"
    if kind is h2.events.RemoteSettingsChanged and len(conn.remote_settings) > SETTINGS_KEPT:
        return "too many settings"
    return ""
