"""The addon that records flows: one terminal event each, in the journal before the client has its response."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from mitmproxy import http

from megido_capture.counters import Counters, contained
from megido_capture.recording.emitter import MAX_INLINE, SMALL_HEADS, Emitter
from megido_capture.recording.errors import Cause, failure
from megido_capture.recording.flows import body_of, request_of, response_of, server_peer
from megido_capture.recording.state import FlowState, Keep, Registry
from megido_capture.recording.tee import Tee
from megido_shared import events, ids
from megido_shared.clock import Clock
from megido_shared.events import (
    EMPTY_BODY,
    Body,
    ErrorType,
    Failure,
    FlowCompleted,
    FlowFailed,
    FlowInterrupted,
    FlowStarted,
    Request,
)

type Terminal = FlowCompleted | FlowFailed | FlowInterrupted

ANNOUNCE_AFTER = 0.5
"""Seconds after which an open flow is announced with `FlowStarted`."""

SMALL_BODIES = 128 * 1024
"""Bodies up to here fit into a record beside the largest heads that are let through."""

_REUSED = (-1, -1)
"""Connect and TLS time where there was none."""


class Recorder:
    """Hooks of a flow's life. The others (tee, rules, access) reach its state through the registry."""

    name = "megido-recorder"

    def __init__(self, emitter: Emitter, registry: Registry, counters: Counters, clock: Clock, keep: Keep) -> None:
        self.counters = counters
        self._emitter = emitter
        self._registry = registry
        self._clock = clock
        self.keep = keep
        """Of the flows that open from now on."""
        self.stopping = False
        """The node cuts its clients: what has not ended by now is interrupted."""
        self.arrived: Callable[[http.HTTPFlow], tuple[bytes, bytes]] = lambda flow: (b"", b"")
        """What there is of the bodies of a flow that ends before they do."""
        self.was_reset: Callable[[http.HTTPFlow], bool] = lambda flow: False
        """Whether the server's connection was reset: mitmproxy takes that for the end of a body without a length."""

    @contained
    def open(self, flow: http.HTTPFlow) -> None:
        """The hook `requestheaders`, ahead of the addons that use the state."""
        registry = self._registry
        if flow.id in registry.refused:
            registry.refused.discard(flow.id)
            return
        client = registry.client(flow.client_conn)
        registry.open(FlowState(flow, ids.new_id(), client, self._clock.time_us(), time.monotonic(), keep=self.keep))

    @contained
    def request(self, flow: http.HTTPFlow) -> None:
        state = self._registry.flows.get(flow.id)
        if state is not None:
            state.sent = True
            state.active = time.monotonic()

    @contained
    def responseheaders(self, flow: http.HTTPFlow) -> None:
        state = self._registry.flows.get(flow.id)
        if state is not None and state.first_byte < 0:
            state.first_byte = state.active = time.monotonic()

    @contained
    def response(self, flow: http.HTTPFlow) -> None:
        why = self._why_broken(flow) if _ends_with_the_connection(flow) else None
        if why is not None and (state := self._ended(flow)) is not None:
            self._fail(state, why)
        else:
            self.complete(flow)

    @contained
    def error(self, flow: http.HTTPFlow) -> None:
        if self.stopping:
            self._interrupt(flow)
            return
        state = self._ended(flow)
        if state is None:
            return
        message = flow.error.msg if flow.error else ""
        noted = self._noted(state, message)
        self._fail(state, failure(message, state.cut or noted))

    def complete(self, flow: http.HTTPFlow) -> None:
        """Appends `FlowCompleted`, once: nothing when the flow has ended already."""
        state = self._ended(flow)
        if state is not None:
            self._write(state, self._completed, "completed")

    def _completed(self, state: FlowState) -> FlowCompleted:
        return self._whole(state) or self._passed(state)

    def _whole(self, state: FlowState) -> FlowCompleted | None:
        """The record of nearly all flows: held whole, and small. None for one that is neither."""
        flow, emitter, keep = state.flow, self._emitter, state.keep
        response, connected = flow.response, flow.server_conn
        if response is None or state.request_tee is not None or state.response_tee is not None:
            return None
        request_body = body_of(flow.request.data.content, keep.request)
        response_body = body_of(response.data.content, keep.response)
        if len(request_body.data) + len(response_body.data) > SMALL_BODIES:
            return None
        server = self._registry.servers.get(connected.id)
        return FlowCompleted(
            event_id=ids.new_id(),
            node=emitter.node,
            epoch=emitter.epoch,
            time_us=state.time_us,
            source_app=emitter.source_app,
            flow_id=state.flow_id,
            request=request_of(flow.request, request_body),
            response=response_of(response, response_body),
            client=state.client.peer,
            server=server_peer(connected) if server is None else server.peer(connected),
            timing=state.timing(time.monotonic(), _REUSED if server is None else server.take()),
            rules=state.rules,
            cached=state.cached,
            seq=emitter.next_seq(),  # last: a number that is given must be written
        )

    def _passed(self, state: FlowState) -> FlowCompleted:
        fields = self._fields(state, terminal=True)
        if state.request_tee is not None and not state.request_tee.ended:
            # Answered before all of it was there, and nobody waits for the rest: nothing else says so.
            request = fields["request"]
            body = msgspec.structs.replace(request.body, truncated=True)
            fields["request"] = msgspec.structs.replace(request, body=body)
        return FlowCompleted(**fields, cached=state.cached, seq=self._emitter.next_seq())

    def announce(self, state: FlowState) -> None:
        """Appends `FlowStarted` with what is known so far."""
        state.announced = True
        if not state.keep.recorded:
            return
        self._emitter.write(FlowStarted(**self._fields(state, terminal=False)))

    def interrupt(self, state: FlowState) -> None:
        """Appends `FlowInterrupted`: this process ends before the flow does."""
        self._interrupt(state.flow)

    def _interrupt(self, flow: http.HTTPFlow) -> None:
        state = self._ended(flow)
        if state is not None:
            self._write(state, self._interrupted, "interrupted")

    def _interrupted(self, state: FlowState) -> FlowInterrupted:
        fields = self._fields(state, terminal=True, cut_short=True)
        return FlowInterrupted(**fields, seq=self._emitter.next_seq())

    def client_gone(self, flows: list[FlowState]) -> None:
        """Ends what is still open of a connection that has closed: mitmproxy told us of no end."""
        for state in flows:
            if self.stopping:
                self._interrupt(state.flow)
            elif self._ended(state.flow) is not None:
                self._fail(state, failure("client disconnected", state.cut))

    def tick(self, now: float) -> None:
        """Called a few times a second: announces flows that stay open."""
        for state in list(self._registry.older_than(now - ANNOUNCE_AFTER)):
            if not state.announced:
                self.announce(state)

    def _fail(self, state: FlowState, why: Failure) -> None:
        self._write(state, partial(self._failed, why), "failed")

    def _failed(self, why: Failure, state: FlowState) -> FlowFailed:
        fields = self._fields(state, terminal=True, cut_short=True)
        address = state.flow.server_conn.address
        if not fields["request"].host and address is not None:
            # Refused before mitmproxy knew where it was to go: to where the tunnel leads.
            scheme = "https" if state.flow.client_conn.tls else "http"
            place = {"host": address[0], "port": address[1], "scheme": scheme}
            fields["request"] = msgspec.structs.replace(fields["request"], **place)
        return FlowFailed(**fields, failure=why, seq=self._emitter.next_seq())

    def _write(self, state: FlowState, make: Callable[[FlowState], Terminal], counted: str) -> None:
        """Appends the terminal event of a flow, whose state is with us alone: whatever `make` raises, there is one. It
        takes the event's number last, so that what it raises leaves no hole in accounting."""
        event: Terminal | None = None
        try:
            event = make(state)
            value = events.encode(event)
        except Exception as error:  # noqa: BLE001 - counted, and told in the record
            self.counters.hook_failed("record", error)
            event, counted = self._least(state, error, event), "failed"
            value = events.encode(event)
        self._emitter.append(event, value)
        self.counters[counted] += 1

    def _least(self, state: FlowState, error: Exception, event: Terminal | None) -> FlowFailed:
        """What can be said of a flow whose record could not be made: `event` when its fields could."""
        data = state.flow.request.data
        return FlowFailed(
            **self._emitter.stamp(state.time_us),
            flow_id=state.flow_id,
            request=Request(
                method=data.method,
                scheme="https" if data.scheme == b"https" else "http",
                host=data.host.encode(errors="replace").decode(),
                port=data.port,
                target=data.path,
            ),
            failure=Failure(ErrorType.OTHER, f"could not be recorded: {type(error).__name__}"),
            seq=event.seq if event is not None else self._emitter.next_seq(),
        )

    def _ended(self, flow: http.HTTPFlow) -> FlowState | None:
        """The state of a flow that ends now, if its end is to be recorded."""
        state = self._registry.close(flow)
        if state is None or state.keep.recorded:
            return state
        self.counters["unrecorded"] += 1
        return None

    def _fields(self, state: FlowState, *, terminal: bool, cut_short: bool = False) -> dict[str, Any]:
        flow, emitter = state.flow, self._emitter
        request, response = flow.request.data.content, flow.response.data.content if flow.response else b""
        if cut_short and (request is None or response is None):
            request, response = self._so_far(state, request, response)
        request_body = _body(state.request_tee, request, state.keep.request)
        response_body = EMPTY_BODY
        if flow.response is not None:
            response_body = _body(state.response_tee, response, state.keep.response)
        inline = len(request_body.data) + len(response_body.data)
        room = MAX_INLINE - max(0, _heads(flow) - SMALL_HEADS) if inline > SMALL_BODIES else MAX_INLINE
        if terminal:
            request_body, response_body = emitter.fit(state.flow_id, request_body, response_body, state.time_us, room)
            for tee in (state.request_tee, state.response_tee):
                if tee is not None:
                    tee.close()
        elif inline > room:
            request_body = response_body = EMPTY_BODY
        server = self._registry.servers.get(flow.server_conn.id)
        fields = emitter.stamp(state.time_us)
        fields.update(
            flow_id=state.flow_id,
            request=request_of(flow.request, request_body),
            response=None if flow.response is None else response_of(flow.response, response_body),
            client=state.client.peer,
            server=server.peer(flow.server_conn) if server else server_peer(flow.server_conn),
            timing=state.timing(time.monotonic(), server.take() if server and terminal else _REUSED),
            rules=state.rules,
        )
        return fields

    def _so_far(self, state: FlowState, request: bytes | None, response: bytes | None) -> tuple[bytes, bytes]:
        """The bodies of a flow that ends before they do, as far as they have come."""
        try:
            request_part, response_part = self.arrived(state.flow)
        except Exception as error:  # noqa: BLE001 - counted; the rest is recorded
            self.counters.hook_failed("arrived", error)
            request_part = response_part = b""
        if state.request_tee is not None and request_part:
            state.request_tee(request_part)
        return request or request_part, response or response_part

    def _why_broken(self, flow: http.HTTPFlow) -> Failure | None:
        """Why a body without a length did not come to its end: mitmproxy takes every end of the connection for it."""
        state = self._registry.flows.get(flow.id)
        if state is not None and state.cut is not None:
            return failure("", state.cut)
        try:
            reset = self.was_reset(flow)
        except Exception as error:  # noqa: BLE001 - counted; the flow is recorded
            self.counters.hook_failed("was_reset", error)
            return None
        message = "the server reset the connection within the body"
        return Failure(ErrorType.CONNECTION_RESET, message) if reset else None

    def _noted(self, state: FlowState, message: str) -> Cause | None:
        """What a connection hook noted about this flow's upstream, if its failure is why the flow ended."""
        wanted = (state.flow.request.data.host, state.flow.request.data.port)
        for noted in reversed(state.client.failures):
            if noted.address == wanted or noted.cause.message == message:
                noted.reported = True
                return noted.cause
        return None


def _body(tee: Tee | None, content: bytes | None, cap: int) -> Body:
    return body_of(content, cap) if tee is None else tee.body()


def _ends_with_the_connection(flow: http.HTTPFlow) -> bool:
    response = flow.response
    return (
        response is not None
        and callable(response.stream)  # it streamed: its length was not declared, or is large
        and response.data.http_version.startswith(b"HTTP/1")
        and "content-length" not in response.headers
        and "transfer-encoding" not in response.headers
    )


def _heads(flow: http.HTTPFlow) -> int:
    """Bytes that heads and trailers take in a record, about."""
    size = len(flow.request.data.path)
    for message in (flow.request, flow.response):
        for part in (message.data.headers, message.data.trailers) if message is not None else ():
            size += sum(len(name) + len(value) + 8 for name, value in part.fields) if part else 0
    return size
