"""A flow is seen while it is open: in the list after half a second, its answer's head and body as far as they came."""

import asyncio
from typing import Any

import pytest

from tests.e2e.stack import Stack
from tests.support.raw_server import RawServer, Talk
from tests.support.waiting import until

pytestmark = pytest.mark.e2e

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_events_reach_client_and_api_as_they_come(stack: Stack) -> None:
    sent: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(talk: Talk) -> None:
        await talk.head()
        await talk.say(HEAD)
        while event := await sent.get():
            await talk.say(b"%x\r\n%s\r\n" % (len(event), event))
        await talk.say(b"0\r\n\r\n")

    def shown(state: str, body: str) -> Any:
        [flow] = stack.wait_for("case=events")
        found = stack.get(f"/proxy/api/requests/{flow['id']}/")[1]
        answer = found.get("response") or {}
        return found if (found["state"], answer.get("body")) == (state, body) else None

    async with RawServer(script) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.proxy_port)
        writer.write(b"GET http://127.0.0.1:%d/?case=events HTTP/1.1\r\nHost: x\r\n\r\n" % server.port)
        body = ""
        for number in range(3):
            sent.put_nowait(b"data: %d\n\n" % number)
            await asyncio.wait_for(reader.readuntil(b"data: %d\n\n" % number), 20)  # before the next one is sent
            body += f"data: {number}\n\n"
            found = await asyncio.to_thread(until, lambda: shown("started", body), "the event in the API")  # noqa: B023
            assert found["response"]["status_code"] == 200
        sent.put_nowait(b"")
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 20)
        writer.close()
        await asyncio.to_thread(until, lambda: shown("completed", body), "the whole flow in the API")
