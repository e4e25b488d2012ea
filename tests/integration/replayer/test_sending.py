"""One item at a time: what reaches the target, what is recorded, what the row says."""

import asyncio
import hashlib
import socket
import ssl

import pytest
import trustme

from megido_shared import events, ids
from megido_shared.events import BodyChunk, ErrorType, FlowCompleted, FlowFailed, ReplayProgressed
from megido_shared.testing import a_completed_flow, a_request
from tests.integration.replayer.harness import replaying
from tests.support.raw_server import OK, RawServer


async def answering(talk):
    while True:
        await talk.head()
        await talk.say(OK)


def saying(answer):
    async def script(talk):
        await talk.head()
        await talk.say(answer)

    return script


async def test_a_replay_is_sent_byte_for_byte_and_stored_as_a_flow(world):
    body = bytes(range(256))
    headers = [
        (b"hOST", b"name.test"),
        (b"X-a", b"1"),
        (b"x-A", b"\xff"),
        (b"Cookie", b"a=1"),
        (b"Content-length", b"256"),
    ]
    sent = (
        b"PoST /a//%7e/../b?x=%zz&x= HTTP/1.1\r\nhOST: name.test\r\nX-a: 1\r\nx-A: \xff\r\nCookie: a=1\r\n"
        b"Content-length: 256\r\n\r\n" + body
    )

    async def script(talk):
        await talk.exactly(len(sent))
        await talk.say(b"HTTP/1.1 201 Made\r\nSet-Cookie: a\r\nset-cookie: b\r\nContent-Length: 3\r\n\r\n\0\xff!")
        await talk.rest()

    async with RawServer(script) as server:
        original = await world.store_request(
            server.port,
            b"PoST",
            b"/a//%7e/../b?x=%zz&x=",
            headers=headers,
            body=events.Body(data=body, size=len(body)),
        )
        job = world.job([original])
        async with replaying(world.settings()):
            (item,) = await world.ended(job)
        assert server.received == [sent]
    assert (item.state, item.status, item.error, item.attempt) == ("succeeded", 201, None, 1)
    assert world.job_state(job) == "done"

    (flow,) = await world.published(FlowCompleted)
    assert flow.is_replay
    assert flow.source_app == "replay"
    assert (flow.original_flow_id, flow.replay_job_id, flow.replay_position) == (original.bytes, job.bytes, 0)
    assert flow.flow_id == item.result_flow_id.bytes
    assert (flow.request.method, flow.request.target) == (b"PoST", b"/a//%7e/../b?x=%zz&x=")
    assert events.unpack_headers(flow.request.headers) == headers
    assert flow.request.body.data == body
    assert events.unpack_headers(flow.response.headers)[:2] == [(b"Set-Cookie", b"a"), (b"set-cookie", b"b")]
    assert (flow.response.status, flow.response.reason, flow.response.body.data) == (201, b"Made", b"\0\xff!")
    assert flow.timing.response_us >= flow.timing.first_byte_us > 0
    assert flow.seq == 1
    progress = await world.published(ReplayProgressed)
    assert [(one.state, one.attempt, one.flow_id, one.deviations) for one in progress] == [
        ("begun", 1, flow.flow_id, ()),
        ("succeeded", 1, flow.flow_id, ()),
    ]

    await world.ingest_published()
    stored = await world.load(item.result_flow_id)
    assert (stored.row.status, stored.response_body.data, stored.row.is_replay) == (201, b"\0\xff!", True)
    assert stored.request_headers == headers


@pytest.mark.parametrize(
    ("target", "line", "host"),
    [
        ("http://localhost:{port}", b"GET /v1/users?id=1 HTTP/1.1", b"localhost:{port}"),
        ("http://127.0.0.1:{port}/", b"GET /v1/users?id=1 HTTP/1.1", b"127.0.0.1:{port}"),
        ("http://localhost:{port}/api/test", b"GET /api/test HTTP/1.1", b"localhost:{port}"),
    ],
)
async def test_another_target(world, target, line, host):
    async with RawServer(answering) as server:
        port = str(server.port)
        original = await world.store_request(
            443,
            target=b"/v1/users?id=1",
            scheme="https",
            host="api.example.com",
            headers=[(b"HOST", b"api.example.com")],
        )
        job = world.job([original], target_url=target.replace("{port}", port))
        async with replaying(world.settings()):
            (item,) = await world.ended(job)
        assert item.state == "succeeded", item.error
        assert server.received == [line + b"\r\nHOST: " + host.replace(b"{port}", port.encode()) + b"\r\n\r\n"]
    (flow,) = await world.published(FlowCompleted)
    assert (flow.request.scheme, flow.request.port) == ("http", server.port)


async def test_an_http2_original_is_sent_as_http1(world):
    async with RawServer(answering) as server:
        original = await world.store_request(
            server.port,
            target=b"/two",
            http_version="HTTP/2.0",
            authority=b"name.test",
            headers=[(b"accept", b"*/*"), (b"cookie", b"a=1"), (b"x", b"1"), (b"cookie", b"b=2")],
        )
        job = world.job([original])
        async with replaying(world.settings()):
            await world.ended(job)
        assert server.received == [
            b"GET /two HTTP/1.1\r\nHost: name.test\r\naccept: */*\r\ncookie: a=1; b=2\r\nx: 1\r\n\r\n"
        ]
    (flow,) = await world.published(FlowCompleted)
    assert flow.request.http_version == "HTTP/1.1"
    told = ("http-version: recorded as HTTP/2.0, sent as HTTP/1.1", "host: added")
    assert (await world.published(ReplayProgressed))[0].deviations == told
    assert [tuple(item.deviations) for item in world.items(job)] == [told]


async def test_https_with_its_name_and_verification_as_asked(world, tmp_path):
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    async with RawServer(answering, tls=context) as server:
        original = await world.store_request(server.port, scheme="https", host="localhost")
        refused, unverified = world.job([original]), world.job([original], verify_tls=False)
        async with replaying(world.settings()):
            (one,), (two,) = await world.ended(refused), await world.ended(unverified)
        assert (one.state, two.state) == ("failed", "succeeded")
        trusted = world.job([original])
        async with replaying(world.settings(ca_file=path)):
            (three,) = await world.ended(trusted)
        assert three.state == "succeeded", three.error
    (failed,) = await world.published(FlowFailed)
    assert failed.failure.error_type is ErrorType.SSL_ERROR
    assert (one.error, one.result_flow_id.bytes) == (failed.failure.message, failed.flow_id)
    assert [flow.server.sni for flow in await world.published(FlowCompleted)] == ["localhost", "localhost"]


# What cannot be sent


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"allow_loopback": False}, "loopback addresses are allowed only"),
        ({"target_url": "http://169.254.169.254/latest/meta-data"}, "metadata"),
        ({"target_url": "http://localhost:{own}/proxy/api/"}, "Megido's own"),
        ({"target_url": "http://[::ffff:127.0.0.1]:{own}/"}, "Megido's own"),
        ({"target_url": "http://127.1:65002/", "protect": ["127.0.0.1:65002"]}, "Megido's own"),
        ({"target_url": "http://[::1]:65003/", "protect": ["[::1]:65003", "unreadable"]}, "Megido's own"),
        ({"target_url": "ftp://h/"}, "must begin with http"),
    ],
)
async def test_refused_targets_are_not_sent_to(world, options, error):
    async with RawServer(answering) as server:
        original = await world.store_request(server.port)
        with world.sql() as sql:  # a proxy that said where it listens
            sql.execute(
                "INSERT INTO nodes (node, epoch, service, state, version, listen, config_version, config_stale, pinned,"
                " counters, captured, seen_at) VALUES ('capture-0', %s, 'capture', 'running', '1', '127.0.0.1:65001',"
                " 0, false, '{}', '{}', 0, now())",
                (ids.to_uuid(ids.new_id()),),
            )
        if "target_url" in options:
            options = options | {"target_url": options["target_url"].replace("{own}", "65001")}
        job = world.job([original], **options)
        async with replaying(world.settings()):
            (item,) = await world.ended(job)
            await asyncio.sleep(0)
        assert server.talks == []
    assert item.state == "failed"
    assert error in item.error
    assert item.result_flow_id is None
    assert world.job_state(job) == "failed"
    assert await world.published(ReplayProgressed) == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"body": events.Body(data=b"ab", size=5, truncated=True)}, "2 of 5 bytes"),
        ({"body": events.Body(size=5, sha256=b"x" * 32)}, "0 of 5 bytes"),
        ({"scheme": "ws"}, "WebSocket"),
        ({"headers": [(b"Host", b"h"), (b"A", b"1\r\nB: 2")]}, "line break"),
    ],
)
async def test_what_would_be_another_request_is_not_sent(world, changes, error):
    async with RawServer(answering) as server:
        original = await world.store_request(server.port, b"POST", **changes)
        job = world.job([original])
        async with replaying(world.settings()):
            (item,) = await world.ended(job)
        assert server.talks == []
    assert item.state == "failed"
    assert error in item.error
    assert item.result_flow_id is None


async def test_a_flow_that_is_gone_and_options_that_cannot_be_read(world):
    gone = world.job([ids.to_uuid(ids.new_id())])
    unreadable = world.job([ids.to_uuid(ids.new_id())])
    with world.sql() as sql:
        sql.execute('UPDATE replay_jobs SET options = \'{"delay_s": "x"}\' WHERE job_id = %s', (unreadable,))
    async with replaying(world.settings()):
        (one,), (two,) = await world.ended(gone), await world.ended(unreadable)
    assert (one.state, world.job_state(gone)) == ("failed", "failed")
    assert "request 7 is not stored" in one.error
    assert (two.state, world.job_state(unreadable)) == ("failed", "failed")
    assert "delay_s" in two.error


# What fails on the way


async def test_failures_are_flows_of_the_right_type(world):
    async def silent(talk):
        await talk.rest()

    async with (
        RawServer(silent) as silent_server,
        RawServer(saying(b"nonsense\r\n\r\n")) as odd,
        RawServer(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")) as cut,
    ):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            ports = [silent_server.port, odd.port, cut.port, taken.getsockname()[1]]
            originals = [await world.store_request(port) for port in ports]
            originals.append(await world.store_request(80, host="nowhere.invalid"))
            job = world.job(originals, timeout_s=0.5)
            async with replaying(world.settings()):
                items = await world.ended(job)
    assert [item.state for item in items] == ["timed_out", "failed", "failed", "failed", "failed"]
    assert world.job_state(job) == "done"
    failed = {flow.flow_id: flow for flow in await world.published(FlowFailed)}
    flows = [failed[item.result_flow_id.bytes] for item in items]
    assert [flow.failure.error_type for flow in flows] == [
        ErrorType.TIMEOUT,
        ErrorType.PROTOCOL_ERROR,
        ErrorType.CONNECTION_RESET,
        ErrorType.CONNECTION_RESET,
        ErrorType.DNS_ERROR,
    ]
    assert (flows[2].response.status, flows[2].response.body.data, flows[2].response.body.truncated) == (
        200,
        b"abc",
        True,
    )
    assert [item.status for item in items] == [None, None, 200, None, None]
    await world.ingest_published()
    assert (await world.load(items[0].result_flow_id)).row.error_type == "TIMEOUT"


async def test_large_bodies_travel_in_chunks_and_are_capped(world):
    body = bytes(range(251)) * 4000  # 1,004,000 bytes

    async def script(talk):
        while True:
            await talk.head()
            await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1004000\r\n\r\n" + body)

    async with RawServer(script) as server:
        original = await world.store_request(server.port)
        whole, cut = world.job([original]), world.job([original], max_response_bytes=900_000)
        async with replaying(world.settings()):
            (one,), (two,) = await world.ended(whole), await world.ended(cut)
    flows = {flow.flow_id: flow for flow in await world.published(FlowCompleted)}
    first, second = flows[one.result_flow_id.bytes].response.body, flows[two.result_flow_id.bytes].response.body
    digest = hashlib.sha256(body).digest()
    assert (first.size, first.sha256, first.truncated, first.data) == (len(body), digest, False, b"")
    assert (second.size, second.sha256, second.truncated) == (len(body), digest, True)
    chunks = [chunk for chunk in await world.published(BodyChunk) if chunk.flow_id == one.result_flow_id.bytes]
    assert b"".join(chunk.data for chunk in chunks) == body
    assert first.chunks == len(chunks) == 2
    assert max(len(record.value) for record in await world.records()) < 900_000
    await world.ingest_published()
    assert (await world.load(one.result_flow_id)).response_body.data == body
    assert (await world.load(two.result_flow_id)).response_body.data == body[:900_000]


async def test_redirects_only_when_asked_and_each_hop_is_recorded_and_checked(world):
    async def script(talk):
        while True:
            head = await talk.head()
            if head.startswith(b"GET /end"):
                await talk.say(OK)
            else:
                where = b"http://169.254.169.254/" if b"/bad" in head else b"/end?x#part"
                await talk.say(b"HTTP/1.1 302 Found\r\nLocation: " + where + b"\r\nContent-Length: 0\r\n\r\n")

    async with RawServer(script) as server:
        secret = [(b"Host", b"127.0.0.1"), (b"Cookie", b"a=1")]
        start = await world.store_request(server.port, target=b"/start", headers=secret)
        bad = await world.store_request(server.port, target=b"/bad")
        plain, followed = world.job([start]), world.job([start], follow_redirects=3)
        refused = world.job([bad], follow_redirects=3)
        async with replaying(world.settings()):
            items = [(await world.ended(job))[0] for job in (plain, followed, refused)]
    assert [(item.state, item.status) for item in items] == [("succeeded", 302), ("succeeded", 200), ("succeeded", 302)]
    flows = [flow for flow in await world.published(FlowCompleted) if flow.replay_job_id == followed.bytes]
    assert [(flow.request.target, flow.response.status) for flow in flows] == [(b"/start", 302), (b"/end?x", 200)]
    assert flows[1].flow_id == items[1].result_flow_id.bytes
    assert (b"Cookie", b"a=1") in events.unpack_headers(flows[1].request.headers)


async def test_the_original_is_an_odd_one(world):
    """All 256 byte values in a header and a body, an odd method, a NUL in the path."""
    everything = bytes(set(range(256)) - {0, 10, 13})
    body = bytes(range(256)) * 2
    async with RawServer(answering) as server:
        flow = a_completed_flow(
            request=a_request(
                method=b"M\xff-SEARCH",
                scheme="http",
                host="127.0.0.1",
                port=server.port,
                target=b"/\xff\xfe?%00",
                headers=events.pack_headers([(b"Host", b"h"), (b"X-All", everything), (b"Content-Length", b"512")]),
                body=events.Body(data=body, size=512),
            )
        )
        job = world.job(await world.store(flow))
        async with replaying(world.settings()):
            (item,) = await world.ended(job)
        assert item.state == "succeeded", item.error
        head = b"M\xff-SEARCH /\xff\xfe?%00 HTTP/1.1\r\nHost: h\r\nX-All: " + everything
        assert server.received[0].startswith(head + b"\r\nContent-Length: 512\r\n\r\n")
