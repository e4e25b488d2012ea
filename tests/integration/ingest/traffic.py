"""Events of every kind, for tests of ingest."""

import itertools
import random
from typing import Any

from megido_shared import events, ids
from megido_shared.testing import a_completed_flow, a_request, a_response
from megido_shared.testing.builders import EPOCH

TIME = 1_771_000_000_000_000


def an_event(kind: type, **fields: Any) -> Any:
    common = {"event_id": ids.new_id(), "node": "capture-0", "epoch": EPOCH, "seq": 0, "time_us": TIME}
    return kind(**(common | fields))


def states_of_a_flow(flow_id: bytes) -> list[events.AnyEvent]:
    """One flow in each state that it can be in, and the chunks of its body."""
    whole = random.Random(7).randbytes(3000)
    chunks = [
        an_event(events.BodyChunk, flow_id=flow_id, side="response", index=n, data=whole[n * 1500 : (n + 1) * 1500])
        for n in range(2)
    ]
    streamed = events.Body(size=3000, chunks=2)
    common: dict[str, Any] = {"flow_id": flow_id, "request": a_request(scheme="http")}
    failure = events.Failure(events.ErrorType.TIMEOUT, "too slow")
    head = a_response(body=events.Body())
    return [
        an_event(events.FlowStarted, **common, response=head),
        an_event(events.FlowInterrupted, **common, seq=1, response=a_response(body=streamed)),
        an_event(events.FlowFailed, **common, seq=2, failure=failure),
        an_event(
            events.FlowCompleted, **(common | {"request": a_request()}), seq=3, response=a_response(body=streamed),
            timing=events.Timing(response_us=900),
        ),
        *chunks,
    ]  # fmt: skip


def mixed_traffic(seed: int, count: int) -> list[events.AnyEvent | bytes]:
    """Traffic with everything in it, dead letters too."""
    rng = random.Random(seed)
    made: list[events.AnyEvent | bytes] = []
    seq = itertools.count(1)
    for _ in range(count):
        flow_id = ids.new_id()
        states = states_of_a_flow(flow_id)
        pick = rng.randrange(8)
        if pick == 0:
            made += [states[0], states[4], states[5], states[3]]
        elif pick == 1:
            made += [states[0], states[2]]
        elif pick == 2:
            made.append(
                an_event(
                    events.WebSocketMessage, message_id=ids.new_id(), flow_id=flow_id, seq=next(seq),
                    connection_id=ids.connection_id(flow_id), url="wss://x/", direction="SEND", message_type="TEXT",
                    payload=rng.randbytes(300), size=300,
                )
            )  # fmt: skip
        elif pick == 3:
            made.append(an_event(events.AuthAttempted, auth_id=ids.new_id(), success=rng.random() < 0.5, seq=next(seq)))
        elif pick == 4:
            failure = events.Failure(events.ErrorType.SSL_ERROR, "handshake")
            made.append(an_event(events.ErrorRaised, error_id=ids.new_id(), failure=failure, seq=next(seq)))
        elif pick == 5:
            made.append(rng.randbytes(40))
        elif pick == 6:
            made.append(an_event(events.NodeStatus, state="running", counters={"flows": 1}, captured=3))
        else:
            body = events.Body(data=rng.randbytes(2000), size=2000)
            made.append(a_completed_flow(flow_id=flow_id, seq=next(seq), response=a_response(body=body)))
    return made
