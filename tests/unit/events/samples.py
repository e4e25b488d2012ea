"""One full event of each type: every field set, so that golden bytes cover every field."""

from megido_shared import events

UUID = bytes.fromhex("0199c0ffee007abc8def0123456789ab")
OTHER = bytes.fromhex("0199c0ffee007abc8def0123456789ac")
EPOCH = bytes(range(16))
ALL_BYTES = bytes(range(256))
COMMON = {
    "event_id": UUID,
    "node": "capture-0",
    "epoch": EPOCH,
    "seq": 7,
    "time_us": 1771000000123456,
    "source_app": "scanner",
}
PEER = events.Peer(ip="192.0.2.1", port=50123, tls="TLSv1.3", alpn="h2", sni="api.example.com")
FAILURE = events.Failure(error_type=events.ErrorType.TIMEOUT, message="no answer", stack_trace="Trace\n line")
REQUEST = events.Request(
    method=b"PO\xffST",
    scheme="https",
    host="api.example.com",
    port=8443,
    target=b"/a\x00b?\xff=1",
    authority=b"api.example.com:8443",
    http_version="HTTP/2.0",
    headers=events.pack_headers([(b"X-Case", b"1"), (b"x-case", ALL_BYTES)]),
    trailers=events.pack_headers([(b"T", b"\x00")]),
    body=events.Body(data=ALL_BYTES, size=5000, sha256=b"h" * 32, chunks=0, truncated=True),
)
RESPONSE = events.Response(
    status=201,
    reason=b"Cre\xe9",
    http_version="HTTP/1.0",
    headers=events.pack_headers([(b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2")]),
    trailers=events.pack_headers([(b"Sum", b"9")]),
    body=events.Body(size=3, sha256=b"s" * 32, chunks=2),
)
FLOW = COMMON | {
    "flow_id": OTHER,
    "request": REQUEST,
    "response": RESPONSE,
    "client": PEER,
    "server": PEER,
    "timing": events.Timing(connect_us=1, tls_us=2, first_byte_us=3, response_us=4),
    "is_replay": True,
    "original_flow_id": UUID,
    "replay_job_id": UUID,
    "replay_position": 3,
    "posted_id": 12,
    "rules": (1, 2),
}

SAMPLES: list[events.AnyEvent] = [
    events.FlowStarted(**FLOW),
    events.FlowInterrupted(**FLOW),
    events.FlowFailed(**FLOW, failure=FAILURE),
    events.FlowCompleted(**FLOW, cached=True, error_message="late"),
    events.BodyChunk(**COMMON, flow_id=OTHER, side="response", index=4, data=ALL_BYTES),
    events.WebSocketMessage(
        **COMMON,
        message_id=OTHER,
        flow_id=UUID,
        connection_id="ws_" + UUID.hex(),
        url="wss://api.example.com/ws",
        direction="RECEIVE",
        message_type="CLOSE",
        payload=ALL_BYTES,
        size=300,
        truncated=True,
        sequence=9,
        close_code=1009,
        close_reason="too big",
        client=PEER,
        posted_id=13,
    ),
    events.ErrorRaised(**COMMON, error_id=OTHER, failure=FAILURE, url="https://x/", client=PEER, posted_id=14),
    events.AuthAttempted(
        **COMMON, auth_id=OTHER, success=True, username="u", failure_reason="r", client=PEER, posted_id=15, attempts=16
    ),
    events.NodeStatus(
        **COMMON,
        state="running",
        service="replayer",
        version="0.1.0",
        pid=99,
        listen="127.0.0.1:8080",
        config_version=4,
        config_stale=True,
        pinned={"source_app": "scanner"},
        counters={"dropped": 2},
        captured=7,
        config_error="version 5 is refused: why",
    ),
    events.ReplayFlows(**COMMON, job_id=UUID),
    events.ReplayProgressed(
        **COMMON, job_id=UUID, position=2, attempt=1, state="begun", flow_id=OTHER, deviations=("host: added",)
    ),
]
