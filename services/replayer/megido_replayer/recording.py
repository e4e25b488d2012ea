"""What the replayer writes to its journal: that a send begins, and how it ended, as a flow like any other."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import msgspec

from megido_replayer.prepare import Prepared
from megido_replayer.queries import Item
from megido_replayer.transport import RawResponse, SendError
from megido_replayer.transport.wire import Wire
from megido_shared import events, ids
from megido_shared.bus.local import Journal
from megido_shared.clock import Clock
from megido_shared.events import Body, Failure, FlowCompleted, FlowFailed

MAX_INLINE = 800_000
"""Bytes of bodies in one record: with its headers it stays under 900 KB, the topics' limit."""

CHUNK = 512 * 1024
SOURCE_APP = "replay"

type Result = Literal["succeeded", "failed", "timed_out"]


@dataclass(frozen=True, slots=True)
class Sent:
    """One request on its way: what it is, where from, and under which identity its flow is recorded."""

    item: Item
    flow_id: bytes
    prepared: Prepared
    message: Wire
    started_us: int


class Recorder:
    """Writes to the journal. After a method returned True, kill -9 loses nothing of it; False: dropped and counted."""

    def __init__(self, journal: Journal, clock: Clock, max_body_size: int) -> None:
        self._journal = journal
        self._clock = clock
        self._max_body_size = max_body_size

    def begun(self, item: Item, flow_id: bytes, deviations: tuple[str, ...] = ()) -> bool:
        """To be written before the first byte is sent."""
        return self._progress(item, "begun", flow_id, deviations)

    def ended(self, item: Item, result: Result, flow_id: bytes) -> bool:
        return self._progress(item, result, flow_id)

    def completed(self, sent: Sent, response: RawResponse) -> bool:
        """The flow of an answer."""
        request, answered = self._fit(sent, response)
        return self._terminal(
            FlowCompleted,
            sent,
            request=request,
            response=answered,
            client=response.client,
            server=response.server,
            timing=response.timing,
        )

    def failed(self, sent: Sent, error: SendError) -> bool:
        """The flow of a send that got no whole answer, with what was seen of one."""
        request, answered = self._fit(sent, error.response)
        return self._terminal(
            FlowFailed,
            sent,
            request=request,
            response=answered,
            client=error.client,
            server=error.server,
            timing=error.timing,
            failure=Failure(error.error_type, str(error)),
        )

    def status(self, state: Literal["started", "running", "stopping"], **fields: Any) -> bool:
        """A heartbeat."""
        status = events.NodeStatus(
            **self._stamp(self._clock.time_us()),
            state=state,
            service="replayer",
            captured=self._journal.last_seq,
            **fields,
        )
        return self._journal.publish(status)

    def _progress(
        self, item: Item, state: Result | Literal["begun"], flow_id: bytes, deviations: tuple[str, ...] = ()
    ) -> bool:
        progress = events.ReplayProgressed(
            **self._stamp(self._clock.time_us()),
            job_id=item.job_id.bytes,
            position=item.position,
            attempt=item.attempt,
            state=state,
            flow_id=flow_id,
            deviations=deviations,
        )
        return self._journal.publish(progress)

    def _terminal(self, kind: type[FlowCompleted] | type[FlowFailed], sent: Sent, **fields: Any) -> bool:
        item = sent.item
        # Given only now that everything else of the event is there: a number that is not written is a hole.
        seq = self._journal.next_seq()
        flow: FlowCompleted | FlowFailed = kind(
            **self._stamp(sent.started_us),
            seq=seq,
            flow_id=sent.flow_id,
            is_replay=True,
            original_flow_id=item.original_flow_id.bytes,
            replay_job_id=item.job_id.bytes,
            replay_position=item.position,
            **fields,
        )
        return self._journal.publish(flow)

    def _stamp(self, time_us: int) -> dict[str, Any]:
        return {
            "event_id": ids.new_id(),
            "node": self._journal.node,
            "epoch": self._journal.epoch,
            "time_us": time_us,
            "source_app": SOURCE_APP,
        }

    def _fit(self, sent: Sent, response: RawResponse | None) -> tuple[events.Request, events.Response | None]:
        """Both sides as events, large bodies written ahead as chunks."""
        bodies = {"request": _request_body(sent.prepared.request.body, self._max_body_size)}
        if response is not None:
            bodies["response"] = _response_body(response)
        inline = sum(len(body.data) for body in bodies.values())
        for side in sorted(bodies, key=lambda side: -len(bodies[side].data)):
            if inline > MAX_INLINE:
                inline -= len(bodies[side].data)
                bodies[side] = self._split(sent, side, bodies[side])
        request = _request(sent, bodies["request"])
        return request, None if response is None else _response(response, bodies["response"])

    def _split(self, sent: Sent, side: Any, body: Body) -> Body:
        pieces = range(0, len(body.data), CHUNK)
        for index, start in enumerate(pieces):
            chunk = events.BodyChunk(
                **self._stamp(sent.started_us),
                flow_id=sent.flow_id,
                side=side,
                index=index,
                data=body.data[start : start + CHUNK],
            )
            self._journal.publish(chunk)
        digest = body.sha256 or sha256(body.data).digest()
        return msgspec.structs.replace(body, data=b"", sha256=digest, chunks=len(pieces))


def _request(sent: Sent, body: Body) -> events.Request:
    asked, to, message = sent.prepared.request, sent.prepared.to, sent.message
    return events.Request(
        method=asked.method,
        scheme=to.scheme,
        host=to.host,
        port=to.port,
        target=message.target,
        http_version=asked.http_version,
        headers=events.pack_headers(message.headers),
        trailers=events.pack_headers(message.trailers) if message.trailers else events.NO_HEADERS,
        body=body,
    )


def _response(response: RawResponse, body: Body) -> events.Response:
    return events.Response(
        status=response.status,
        reason=response.reason,
        http_version=response.http_version,
        headers=events.pack_headers(response.headers),
        trailers=events.pack_headers(response.trailers) if response.trailers else events.NO_HEADERS,
        body=body,
    )


def _request_body(body: bytes, most: int) -> Body:
    if len(body) <= most:
        return Body(data=body, size=len(body))
    return Body(data=body[:most], size=len(body), sha256=sha256(body).digest(), truncated=True)


def _response_body(response: RawResponse) -> Body:
    return Body(
        data=response.body,
        size=response.body_size,
        sha256=response.sha256,
        truncated=response.truncated or not response.complete,
    )
