"""The addon that decides which bodies stream, and puts the tee into them.

A body streams when its length is unknown (chunked, close-delimited, HTTP/2 without a length) or above
`STREAM_ABOVE`, and when it is an event stream. What streams is recorded piece by piece before it goes on.
"""

import time
from collections.abc import Callable
from functools import partial

from mitmproxy import http

from megido_capture.counters import Counters, contained
from megido_capture.mitm.flowcontrol import FlowControl
from megido_capture.recording.emitter import Emitter, Side
from megido_capture.recording.flows import content_length
from megido_capture.recording.recorder import Recorder
from megido_capture.recording.state import FlowState, Registry
from megido_capture.recording.tee import Stream, Tee

STREAM_ABOVE = 512 * 1024
"""Bytes. Two bodies of this size still fit into one record."""

_DIGITS = len(str(STREAM_ABOVE))
_LENGTHS = frozenset((len("content-length"), len("transfer-encoding")))


class Streaming:
    name = "megido-streaming"

    def __init__(
        self,
        emitter: Emitter,
        registry: Registry,
        recorder: Recorder,
        counters: Counters,
        must_buffer: Callable[[http.HTTPFlow], bool],
        *,
        flow_control: FlowControl,
    ) -> None:
        self.counters = counters
        self._emitter = emitter
        self._registry = registry
        self._recorder = recorder
        self._must_buffer = must_buffer
        self._flow_control = flow_control

    @contained
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        request = flow.request
        if request.data.http_version.startswith(b"HTTP/1") and not _says_length(request.data.headers.fields):
            return  # nearly all: no body
        state = self._registry.flows.get(flow.id)
        if state is None or flow.response is not None:
            return  # refused, or answered already: mitmproxy cannot stream the body of an answered request
        length = content_length(request.headers)
        if length is None and not _has_body_of_unknown_length(request):
            return
        if (length is not None and length <= STREAM_ABOVE) or self._must_buffer(flow):
            return
        state.request_tee = tee = self._tee(state, "request", inner=_inner(request.stream))
        request.stream = tee

    @contained
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        response = flow.response
        if response is None or _is_small(response.data.headers.fields):
            return  # nearly all
        state = self._registry.flows.get(flow.id)
        if state is None or not _may_have_body(flow.request, response):
            return
        length = content_length(response.headers)
        if length is not None and length <= STREAM_ABOVE and not _is_event_stream(response):
            return
        http1 = flow.request.data.http_version.startswith(b"HTTP/1")
        # With a length, the client has everything with the last byte, before the `response` hook.
        ends_with_length = length is not None and http1
        completed = partial(self._recorder.complete, flow) if ends_with_length else None
        state.response_tee = tee = self._tee(
            state, "response", expected=length, completed=completed, inner=_inner(response.stream)
        )
        response.stream = tee
        if length is None and http1 and "transfer-encoding" not in response.headers:
            # Close-delimited: our death looks like the body's normal end, so the head must be in the journal first.
            self._recorder.announce(state)

    def _tee(
        self,
        state: FlowState,
        side: Side,
        *,
        expected: int | None = None,
        completed: Callable[[], None] | None = None,
        inner: Stream | None = None,
    ) -> Tee:
        emitter = self._emitter
        hold_up = self._flow_control.passing(state.flow, side)

        def append(index: int, data: bytes) -> None:
            emitter.chunk(state.flow_id, side, index, data, state.time_us)

        def passing() -> None:
            state.active = time.monotonic()
            if hold_up is not None:
                hold_up()

        def failed(error: Exception) -> None:
            self.counters.hook_failed(f"{side}_body", error)

        return Tee(
            append,
            state.keep.request if side == "request" else state.keep.response,
            failed=failed,
            expected=expected,
            completed=completed,
            inner=inner,
            passing=passing,
        )


def _inner(stream: Stream | bool) -> Stream | None:
    """Another addon's stream function, which goes on working behind ours."""
    return stream if callable(stream) else None


def _says_length(fields: tuple[tuple[bytes, bytes], ...]) -> bool:
    """Whether a head has a name as long as those that say how a body ends."""
    for name, _ in fields:  # noqa: SIM110 - a generator costs more than the loop
        if len(name) in _LENGTHS:
            return True
    return False


def _is_small(fields: tuple[tuple[bytes, bytes], ...]) -> bool:
    """Whether a response head says a length up to `STREAM_ABOVE`, and nothing else about how its body is to pass. One
    look at each field, in place of a function for each question: 0.5 µs in each flow."""
    small = False
    for name, value in fields:
        size = len(name)
        if size == 14 and name.lower() == b"content-length":
            if len(value) > _DIGITS or not value.isdigit() or int(value) > STREAM_ABOVE:
                return False
            small = True
        elif size == 12 and name.lower() == b"content-type":
            if value[:5].lower() == b"text/" and value.lower().startswith(b"text/event-stream"):
                return False
        elif size == 17 and name.lower() == b"transfer-encoding":
            return False
    return small


def _has_body_of_unknown_length(request: http.Request) -> bool:
    """HTTP/1 without a length has no body unless it is chunked. HTTP/2 tells only by its frames: methods that carry
    none by habit are left alone, streaming them would only cost."""
    if request.data.http_version.startswith(b"HTTP/1"):
        return "transfer-encoding" in request.headers
    return request.data.method not in (b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE")


def _may_have_body(request: http.Request, response: http.Response) -> bool:
    status = response.data.status_code
    return request.data.method != b"HEAD" and status >= 200 and status not in (204, 304)


def _is_event_stream(response: http.Response) -> bool:
    for name, value in response.headers.fields:
        if len(name) == 12 and name.lower() == b"content-type":
            return value.lower().startswith(b"text/event-stream")
    return False
