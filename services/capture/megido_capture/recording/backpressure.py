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
    """Holds requests, and as `messages` those of WebSockets: two addons, each ahead of what records. Their hooks are
    the only ones that wait, and only a node with the policy has them: a hook that may wait costs each request a turn
    of the loop."""

    name = "megido-backpressure"

    def __init__(self, room: Room, counters: Counters, seconds: float) -> None:
        self.room = room
        self.counters = counters
        self.seconds = seconds
        self.messages = _Messages(self)

    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        if flow.response is None:  # else refused, or answered by ourselves
            await self.wait("requestheaders")

    async def wait(self, hook: str) -> None:
        try:
            if self.room.is_open:
                return
            self.counters["journal_waits"] += 1
            if not await self.room.wait(self.seconds):
                self.counters["journal_waits_given_up"] += 1
        except Exception as error:  # noqa: BLE001 - proxied traffic must not depend on what captures it
            self.counters.hook_failed(hook, error)


class _Messages:
    name = "megido-backpressure-messages"

    def __init__(self, held: Backpressure) -> None:
        self._held = held

    async def websocket_message(self, flow: http.HTTPFlow) -> None:
        await self._held.wait("websocket_message")
