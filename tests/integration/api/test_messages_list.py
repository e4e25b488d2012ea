"""The list of WebSocket messages: every payload's beginning, however many and large they are."""

import random
import tracemalloc

from megido_shared import events, ids
from megido_shared.testing import a_completed_flow
from tests.integration.api.harness import Api, Ingest, eventually

PATH = "/proxy/api/websocket-messages/list/"
COUNT = 160


def _message(number: int, flow_id: bytes, payload: bytes) -> events.WebSocketMessage:
    flow = a_completed_flow()
    return events.WebSocketMessage(
        event_id=ids.new_id(), node=flow.node, epoch=flow.epoch, seq=number + 1, time_us=flow.time_us,
        message_id=ids.new_id(), flow_id=flow_id, connection_id=ids.connection_id(flow_id), url="ws://a/",
        direction="SEND", message_type="TEXT", payload=payload, size=len(payload), sequence=number,
    )  # fmt: skip


async def test_a_page_of_large_messages_is_not_loaded_at_once(api: Api, ingest: Ingest) -> None:
    flow_id = ids.new_id()
    noise = random.Random(1).randbytes(150_000).hex().encode()  # compresses to half: more than one zstd block
    await api.publish(*(_message(n, flow_id, b"%04d " % n + noise) for n in range(COUNT)))

    async def stored() -> bool:
        return bool((await api.get("/proxy/api/stats/"))["total_websocket_messages"] == COUNT)

    await eventually(stored, "the messages")
    tracemalloc.start()
    try:
        found = await api.get(PATH, limit=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    numbers = [int(message["payload"][:4]) for message in found["messages"]]
    assert numbers == list(reversed(range(COUNT)))
    assert {len(message["payload"]) for message in found["messages"]} == {203}
    assert {message["payload"][5:200] for message in found["messages"]} == {noise[:195].decode()}
    assert peak < 16 << 20, f"{peak >> 20} MB at once"
