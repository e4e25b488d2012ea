"""Events with sensible contents; name only what the test is about."""

import time
from typing import Any

from megido_shared import events, ids

EPOCH = bytes(range(16))


def a_request(**changes: Any) -> events.Request:
    fields: dict[str, Any] = {
        "method": b"GET",
        "scheme": "https",
        "host": "api.example.com",
        "port": 443,
        "target": b"/users?page=1",
        "headers": events.pack_headers([(b"Host", b"api.example.com"), (b"User-Agent", b"test/1.0")]),
    }
    return events.Request(**(fields | changes))


def a_response(**changes: Any) -> events.Response:
    body = changes.pop("body", b'{"ok": true}')
    if isinstance(body, bytes):
        body = events.Body(data=body, size=len(body))
    fields: dict[str, Any] = {
        "status": 200,
        "reason": b"OK",
        "headers": events.pack_headers([(b"Content-Type", b"application/json")]),
        "body": body,
    }
    return events.Response(**(fields | changes))


def a_completed_flow(**changes: Any) -> events.FlowCompleted:
    fields: dict[str, Any] = {
        "event_id": ids.new_id(),
        "node": "test-0",
        "epoch": EPOCH,
        "seq": 1,
        "time_us": time.time_ns() // 1000,
        "source_app": "browser",
        "flow_id": ids.new_id(),
        "request": a_request(),
        "response": a_response(),
        "client": events.Peer(ip="127.0.0.1", port=50000),
        "timing": events.Timing(first_byte_us=900, response_us=1200),
    }
    return events.FlowCompleted(**(fields | changes))
