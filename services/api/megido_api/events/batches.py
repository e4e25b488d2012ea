"""A forwarder's batch, decoded and checked. Pure."""

import msgspec

from megido_api.problems import Problem
from megido_shared import events
from megido_shared.bus.base import Outgoing
from megido_shared.bus.topics import INGESTED, REPLAY_RESULTS

TOPICS = frozenset(topic.name for topic in (*INGESTED, REPLAY_RESULTS))
"""What a capture or replayer node may publish. Commands and configuration are the API's own."""

_decoder = msgspec.msgpack.Decoder(list[tuple[str, bytes, bytes]])


def parse(raw: bytes) -> list[Outgoing]:
    """Records of a MessagePack list of `[topic, key, value]`, in its order.

    Raises Problem (400) when one of them is not an event as its topic and key say: then none is taken.
    """
    try:
        batch = _decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise Problem(400, "invalid_batch", f"not a MessagePack list of [topic, key, value]: {error}") from error
    return [_record(index, *entry) for index, entry in enumerate(batch)]


def _record(index: int, topic: str, key: bytes, value: bytes) -> Outgoing:
    if topic not in TOPICS:
        raise _bad(index, f"{topic!r} is not a topic of nodes")
    try:
        event = events.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(index, str(error)) from error
    if events.topic_of(event).name != topic:
        raise _bad(index, f"a {type(event).__name__} does not belong on {topic}")
    if events.key_of(event) != key:
        raise _bad(index, "the key is not the event's")
    if getattr(event, "posted_id", 0):
        raise _bad(index, "posted_id is given by the API only")
    return Outgoing(topic, key, value, events.cloud_event_headers(event))


def _bad(index: int, reason: str) -> Problem:
    return Problem(400, "invalid_event", f"event {index}: {reason}", index=index)
