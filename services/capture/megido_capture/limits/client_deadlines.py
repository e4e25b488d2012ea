"""What a client may take too long for: each step to its next request, and a body that is read whole."""

from collections.abc import Callable

from mitmproxy import connection

from megido_capture.configuration.settings import CaptureSettings
from megido_capture.counters import Counters
from megido_capture.limits.places import Place, Places, Step
from megido_capture.mitm.headguard import unfinished
from megido_capture.recording.connections import Connections
from megido_capture.recording.errors import Cause
from megido_capture.recording.flows import content_length
from megido_capture.recording.state import Registry
from megido_shared.events import ErrorType

BODY_PATIENCE, SLOWEST = 3, 1024
"""A body that is read whole before it is sent on has so many times `header_timeout`, and a second for so many bytes."""

READ_WHOLE = 4 << 20
"""Bytes that are read whole of a body whose length nobody has said."""

_H2 = (Step.H2_FRAME, Step.H2_HEAD)
_TOLD = (Step.HANDSHAKE, Step.HEAD, Step.H2_HEAD)
"""What is an error when it takes too long. A connection on which nothing was begun is only closed, as an idle one is:
browsers open some for later and open others when they need them."""


class ClientDeadlines:
    """Looks through all places at each tick. A client has one deadline at a time, that of its `Place.step`, which hooks
    begin and end; what stops within HTTP/2 frames is found here, as no hook tells of it."""

    def __init__(
        self,
        places: Places,
        registry: Registry,
        connections: Connections,
        counters: Counters,
        *,
        end: Callable[[connection.Client], bool],
    ) -> None:
        """`end` ends a client and takes its place away, so that it is found once; False when it is not to be ended."""
        self._places = places
        self._registry = registry
        self._connections = connections
        self._counters = counters
        self._end = end

    def tick(self, now: float, settings: CaptureSettings) -> None:
        limit = settings.header_timeout
        if not limit:
            return
        stopped = self._within_frames()
        late = []
        for place in self._places:
            if stopped or place.step in _H2:
                _follow(place, stopped.get(place.conn.id), now)
            if place.is_late(now, limit):
                late.append(place)
        for place in late:
            self._time_out(place, limit)
        patience = settings.journal_wait if settings.journal_policy == "block" else 0
        self._end_slow_bodies(now, limit * BODY_PATIENCE + patience)

    def _time_out(self, place: Place, limit: int) -> None:
        step = place.step
        if step is not None and self._end(place.conn):
            self._counters["header_timeouts"] += 1
            if step in _TOLD:
                message = f"timed out: the client did not {step.value} within {limit} seconds (header_timeout)"
                self._connections.client_timed_out(place.conn, message)
                state = self._registry.clients.get(place.conn.id)
                for flow in state.flows.values() if state is not None else ():
                    flow.cut = flow.cut or Cause(ErrorType.TIMEOUT, message)

    def _within_frames(self) -> dict[str, Step]:
        """The clients whose HTTP/2 frames have stopped within a head, or within what may become one."""
        found = {}
        for client, in_head in unfinished():
            state = self._registry.clients.get(client.id)
            if in_head or (state is not None and not state.flows):
                found[client.id] = Step.H2_HEAD if in_head else Step.H2_FRAME
        return found

    def _end_slow_bodies(self, now: float, limit: float) -> None:
        """Those that stream are nobody's place in memory, and may take as long as they like."""
        for state in list(self._registry.older_than(now - limit)):
            if state.sent or state.request_tee is not None or state.cut is not None:
                continue
            length = content_length(state.flow.request.headers)
            allowed = limit + (READ_WHOLE if length is None else length) / SLOWEST
            if now - state.started > allowed and self._end(state.flow.client_conn):
                message = f"timed out: the client has not sent the request's body within {allowed:.0f} seconds"
                state.cut = Cause(ErrorType.TIMEOUT, message)
                self._counters["body_timeouts"] += 1


def _follow(place: Place, stopped: Step | None, now: float) -> None:
    """Brings a place's step up to date with what its HTTP/2 connection has of a frame."""
    if stopped is None:
        if place.step in _H2:
            place.step = None
    elif place.step is None:
        place.begin(stopped, now)
    elif place.step is Step.H2_FRAME or stopped is Step.H2_HEAD:
        place.step = stopped  # the deadline that runs already holds for this too
