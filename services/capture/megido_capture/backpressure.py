"""The addon of `journal_policy` block: what would be recorded into a nearly full journal waits, and nothing else does.

A request waits before it goes upstream, a WebSocket message before it goes on: mitmproxy holds that flow alone, the
loop and everybody else's traffic go on. What has begun is never held, it is recorded into the reserve (see
`Journal.is_nearly_full`). The wait is bounded: then the traffic goes on, and what still does not fit is dropped and
counted like with `drop_newest`.
"""

from mitmproxy import http

from megido_capture.counters import Counters
from megido_shared.bus.local import Room


class Backpressure:
    """Its hooks are the only ones that wait. Only a node with the policy has them: a hook that may wait costs each
    request a turn of the loop."""

    name = "megido-backpressure"

    def __init__(self, room: Room, counters: Counters, seconds: float) -> None:
        self.room = room
        self.counters = counters
        self.seconds = seconds

    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is None:  # else refused, or answered by ourselves
            await self._wait("requestheaders")

    async def websocket_message(self, flow: http.HTTPFlow) -> None:
        await self._wait("websocket_message")

    async def _wait(self, hook: str) -> None:
        try:
            if self.room.is_open:
                return
            self.counters["journal_waits"] += 1
            if not await self.room.wait(self.seconds):
                self.counters["journal_waits_given_up"] += 1
        except Exception as error:  # noqa: BLE001 - proxied traffic must not depend on what captures it
            self.counters.hook_failed(hook, error)
