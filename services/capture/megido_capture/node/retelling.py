"""A thread that tells the ends of what earlier lives of a node left open."""

import asyncio
import threading
import time

from megido_capture.counters import Counters
from megido_capture.recording import recovery
from megido_capture.recording.emitter import Emitter
from megido_capture.websocket.recovery import left_open, write_close
from megido_shared.bus.local import Journal


class Retelling:
    """In a thread: a long journal takes a while to read, and the proxy serves meanwhile."""

    def __init__(self, journal: Journal, emitter: Emitter, counters: Counters) -> None:
        self.until = float("inf")
        """On `time.monotonic()`. What is not told by then is told at the next start."""
        self.thread: threading.Thread | None = None
        self._journal = journal
        self._emitter = emitter
        self._counters = counters

    def start(self, cap: int) -> None:
        """`cap`: how many bytes of a body are stored. Call it in the running loop."""
        loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self._tell, args=(cap, loop), name="recovery", daemon=True)
        self.thread.start()

    @property
    def goes_on(self) -> bool:
        """Whether there is something to wait for."""
        return self.thread is not None and self.thread.is_alive() and not self._late()

    def _late(self) -> bool:
        return time.monotonic() >= self.until

    def _tell(self, cap: int, loop: asyncio.AbstractEventLoop) -> None:
        try:
            for fields in recovery.interrupted(self._journal, cap):
                if self._late():
                    return
                recovery.write(self._emitter, fields)
                loop.call_soon_threadsafe(self._counters.update, {"recovered": 1})
            for last in left_open(self._journal):
                if self._late():
                    return
                write_close(self._emitter, last)
        except Exception as error:  # noqa: BLE001 - told, and the node goes on
            loop.call_soon_threadsafe(self._counters.hook_failed, "recovery", error)
