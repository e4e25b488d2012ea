"""The sender against raw servers: every framing of an answer, every way in which it can go wrong."""

import asyncio
import hashlib
import socket
import time

import pytest

from megido_replayer.transport import Origin, RawRequest, Sender, SendError
from megido_replayer.transport.connection import MAX_HEAD_BYTES, MAX_INTERIM
from megido_shared.events import ErrorType
from tests.support.raw_server import OK, RawServer


def to(server, **changes):
    fields = {"scheme": "http", "host": "target.test", "port": server.port, "addresses": ("127.0.0.1",)}
    return Origin(**(fields | changes))


def get(method=b"GET", target=b"/", headers=((b"Host", b"target.test"),), body=b""):
    return RawRequest(method, target, headers, body)


@pytest.fixture
def sender():
    made = Sender()
    yield made
    made.close()


def saying(*pieces, close=True):
    """A script that reads one head and answers with the pieces."""

    async def script(talk):
        await talk.head()
        await talk.say(*pieces)
        if not close:
            await talk.rest()

    return script


async def answering(talk):
    """Answers any number of requests without a body."""
    while True:
        await talk.head()
        await talk.say(OK)


# What is sent


async def test_the_server_receives_exactly_the_bytes(sender):
    async def script(talk):
        await talk.exactly(len(expected))
        await talk.say(OK)
        await talk.rest()

    headers = [
        (b"hOST", b"Elsewhere:81"),
        (b"x-A", b"1"),
        (b"X-a", b"\xe9\xff"),
        (b"x-A", b""),
        (b"content-length", b"4"),
    ]
    asked = RawRequest(b"pOsT", b"//a/../%2e?x=%zz&&y#\xff", headers, b"\0\r\n\xff")
    expected = (
        b"pOsT //a/../%2e?x=%zz&&y#\xff HTTP/1.1\r\nhOST: Elsewhere:81\r\nx-A: 1\r\nX-a: \xe9\xff\r\nx-A: \r\n"
        b"content-length: 4\r\n\r\n\0\r\n\xff"
    )
    async with RawServer(script) as server:
        answer = await sender.send(asked, to(server))
        sender.close()
    assert server.received == [expected]
    assert (answer.status, answer.body, answer.deviations) == (200, b"ok", ())


async def test_a_large_body_arrives_whole_and_once(sender):
    body = bytes(range(256)) * 40_000
    received = {}

    async def script(talk):
        await talk.head()
        received["body"] = await talk.exactly(len(body))
        await talk.say(OK)
        received["more"] = await talk.rest()

    async with RawServer(script) as server:
        headers = [(b"Host", b"h"), (b"Content-Length", str(len(body)).encode())]
        await sender.send(RawRequest(b"PUT", b"/", headers, body), to(server))
    assert received["body"] == body


async def test_a_body_that_was_chunked_is_chunked_again(sender):
    async def script(talk):
        await talk.until(b"0\r\nDigest: x\r\n\r\n")
        await talk.say(OK)

    request = RawRequest(b"POST", b"/", [(b"TRANSFER-encoding", b"chunked")], b"hello", [(b"Digest", b"x")])
    async with RawServer(script) as server:
        answer = await sender.send(request, to(server))
    assert server.received == [
        b"POST / HTTP/1.1\r\nTRANSFER-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nDigest: x\r\n\r\n"
    ]
    assert answer.deviations == ("transfer-encoding: chunk sizes are not recorded, the body is one chunk",)


# Framing of answers

BODY = b"\0answer\xff" * 3


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n" + BODY, BODY, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n18;x=y\r\n" + BODY + b"\r\n0\r\n\r\n", BODY, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n" + BODY[:8] + b"\r\n10\r\n" + BODY[8:]
         + b"\r\n0\r\n\r\n", BODY, True),
        (b"HTTP/1.1 200 OK\r\n\r\n" + BODY, BODY, False),
        (b"HTTP/1.0 200 OK\r\n\r\n" + BODY, BODY, False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n" + BODY, BODY, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 24\r\n\r\n" + BODY, BODY, False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 24\r\n\r\n" + BODY, BODY, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\nConnection: close\r\n\r\n" + BODY, BODY, False),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 24\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 24\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\nContent-Length: 24\n\n" + BODY, BODY, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", [1 << 20, 7, 1])
async def test_framings(sender, answer, body, kept, split):
    pieces = [answer[i : i + split] for i in range(0, len(answer), split)]
    async with RawServer(saying(*pieces)) as server:
        got = await sender.send(get(), to(server))
        assert (got.body, got.body_size, got.truncated, got.complete) == (body, len(body), False, True)
        assert (sender._pool.take(to(server)) is not None) is kept or kept  # closing may be seen already


async def test_the_answer_keeps_its_bytes(sender):
    head = (
        b"HTTP/1.1 299 So \xe9 so\r\nsEt-cookie: a=1\r\nX: \xff\r\nSet-Cookie: b=2\r\nEmpty:\r\n"
        b"content-length: 0\r\n\r\n"
    )
    async with RawServer(saying(head)) as server:
        got = await sender.send(get(), to(server))
    assert (got.status, got.reason, got.http_version) == (299, b"So \xe9 so", "HTTP/1.1")
    assert got.headers == [
        (b"sEt-cookie", b"a=1"),
        (b"X", b"\xff"),
        (b"Set-Cookie", b"b=2"),
        (b"Empty", b""),
        (b"content-length", b"0"),
    ]


async def test_interim_answers_and_trailers(sender):
    pieces = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: 1\r\n\r\n2\r\nok\r\n0\r\nSum: 7\r\nSum: 8\r\n\r\n",
    )
    async with RawServer(saying(*pieces)) as server:
        got = await sender.send(get(), to(server))
    assert [(one.status, one.headers) for one in got.interim] == [(100, []), (103, [(b"Link", b"</x>")])]
    assert got.headers == [(b"Transfer-Encoding", b"chunked"), (b"A", b"1")]
    assert got.trailers == [(b"Sum", b"7"), (b"Sum", b"8")]
    assert got.body == b"ok"


async def test_endless_interim_answers_end(sender):
    async with RawServer(saying(b"HTTP/1.1 102 Processing\r\n\r\n" * (MAX_INTERIM + 1) + OK)) as server:
        with pytest.raises(SendError, match="interim") as raised:
            await sender.send(get(), to(server))
    assert raised.value.error_type is ErrorType.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_head_has_no_body_whatever_it_says(sender, head):
    async def script(talk):
        while True:
            await talk.head()
            await talk.say(head)

    async with RawServer(script) as server:
        for _ in range(3):
            got = await sender.send(get(b"HEAD"), to(server))
            assert (got.body, got.body_size, got.complete) == (b"", 0, True)


async def test_head_and_get_share_a_connection(sender):
    async def script(talk):
        while True:
            head = await talk.head()
            await talk.say(OK[:-2] if head.startswith(b"HEAD") else OK)

    async with RawServer(script) as server:
        for method in (b"HEAD", b"GET", b"HEAD", b"HEAD", b"GET"):
            got = await sender.send(get(method), to(server))
            assert got.body == (b"" if method == b"HEAD" else b"ok")
        assert len(server.talks) == 1


async def test_an_answer_to_head_with_a_body_spoils_only_its_connection(sender):
    async def script(talk):
        while True:
            head = await talk.head()
            await talk.say(OK.replace(b"ok", b"HTTP/1.1 500 Smuggled\r\n\r\n") if head.startswith(b"HEAD") else OK)

    async with RawServer(script) as server:
        assert (await sender.send(get(b"HEAD"), to(server))).status == 200
        assert (await sender.send(get(), to(server))).body == b"ok"


async def test_a_switch_of_protocols_ends_the_exchange(sender):
    head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nother bytes"
    async with RawServer(saying(head, close=False)) as server:
        got = await sender.send(get(headers=[(b"Upgrade", b"x"), (b"Connection", b"upgrade")]), to(server))
        assert (got.status, got.body) == (101, b"")
        assert sender._pool.take(to(server)) is None


# Reuse


async def test_connections_are_used_again_for_safe_methods(sender):
    async with RawServer(answering) as server:
        first = await sender.send(get(), to(server))
        second = await sender.send(get(b"OPTIONS"), to(server))
        assert len(server.talks) == 1
        assert (first.reused, second.reused) == (False, True)
        assert first.timing.connect_us >= 0
        assert second.timing.connect_us == -1
        assert first.timing.response_us >= first.timing.first_byte_us > 0
        assert (first.server.ip, first.server.port) == ("127.0.0.1", server.port)


async def test_unsafe_methods_get_a_connection_of_their_own_and_leave_it_to_others(sender):
    async with RawServer(answering) as server:
        for method in (b"POST", b"DELETE", b"PUT", b"get"):
            await sender.send(get(method), to(server))
        assert len(server.talks) == 4
        await sender.send(get(), to(server))
        assert len(server.talks) == 4


@pytest.mark.parametrize(
    "other", [{"host": "other.test"}, {"sni": "x"}, {"verify": False}, {"addresses": ("::1", "127.0.0.1")}]
)
async def test_connections_belong_to_one_origin(sender, other):
    async with RawServer(answering) as server:
        await sender.send(get(), to(server))
        await sender.send(get(), to(server, **other))
        assert len(server.talks) == 2


async def test_a_kept_connection_that_was_closed_is_replaced_for_a_safe_request(sender):
    """The server closes in the instant in which the second request is on its way."""
    closed = 0

    async def script(talk):
        nonlocal closed
        await talk.head()
        await talk.say(OK)
        if closed:
            await talk.rest()
        closed += 1
        await talk.head()
        talk.reset()

    async with RawServer(script) as server:
        await sender.send(get(), to(server))
        got = await sender.send(get(target=b"/second"), to(server))
    assert (got.status, got.reused) == (200, False)
    assert sum(b"/second" in received for received in server.received) == 2


async def test_a_fresh_connection_that_is_closed_is_no_reason_to_send_again(sender):
    async def script(talk):
        await talk.head()
        talk.reset()

    async with RawServer(script) as server:
        for method in (b"GET", b"POST"):
            with pytest.raises(SendError) as raised:
                await sender.send(get(method), to(server))
            assert raised.value.error_type is ErrorType.CONNECTION_RESET
            assert raised.value.sent is True
            assert raised.value.response is None
    assert len(server.talks) == 2


async def test_a_kept_connection_is_not_retried_once_it_answered(sender):
    async def script(talk):
        await talk.head()
        await talk.say(OK)
        await talk.head()
        await talk.say(b"HTTP/1.1 200")
        talk.writer.close()

    async with RawServer(script) as server:
        await sender.send(get(), to(server))
        with pytest.raises(SendError, match="within the answer's head"):
            await sender.send(get(), to(server))
    assert len(server.talks) == 1


async def test_bytes_behind_the_answer_never_reach_the_next_request(sender):
    async def script(talk):
        await talk.head()
        await talk.say(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nSMUGGLED")
        await talk.rest()

    async with RawServer(script) as server:
        for _ in range(2):
            got = await sender.send(get(), to(server))
            assert got.body == b"ok"
    assert len(server.talks) == 2


async def test_bytes_that_nobody_asked_for_close_a_kept_connection(sender):
    said = asyncio.Event()

    async def script(talk):
        await talk.head()
        await talk.say(OK)
        if len(server.talks) == 1:
            await asyncio.sleep(0)
            await said.wait()
            await talk.say(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await talk.rest()

    async with RawServer(script) as server:
        await sender.send(get(), to(server))
        said.set()
        kept = sender._pool._idle[to(server)][0]
        async with asyncio.timeout(5):
            while kept.alive:
                await asyncio.sleep(0.005)
        assert (await sender.send(get(), to(server))).status == 200
    assert len(server.talks) == 2


async def test_an_answer_before_the_body_was_read_ends_the_connection(sender):
    async def script(talk):
        await talk.head()
        await talk.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(30)

    async with RawServer(script) as server:
        got = await sender.send(get(b"POST", body=b"x" * 30_000_000), to(server), timeout_s=20)
        assert got.status == 413
        assert sender._pool.take(to(server)) is None


# Caps and deadlines


@pytest.mark.parametrize("framing", [b"Content-Length: 3000000", b"Connection: close"])
async def test_the_cap_bounds_what_is_stored_not_what_is_counted(sender, framing):
    body = bytes(range(200)) * 15_000
    async with RawServer(saying(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n" + body)) as server:
        got = await sender.send(get(), to(server), max_body=1000)
    assert got.body == body[:1000]
    assert (got.body_size, got.truncated) == (3_000_000, True)
    assert got.sha256 == hashlib.sha256(body).digest()


async def test_a_body_as_large_as_the_cap_is_whole(sender):
    async with RawServer(saying(OK)) as server:
        got = await sender.send(get(), to(server), max_body=2)
    assert (got.body, got.truncated, got.sha256) == (b"ok", False, b"")


async def test_the_deadline_bounds_an_answer_that_drips(sender):
    async def script(talk):
        await talk.head()
        await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nA: 1\r\n\r\n")
        for _ in range(1000):
            await talk.say(b"x")
            await asyncio.sleep(0.01)

    async with RawServer(script) as server:
        started = time.monotonic()
        with pytest.raises(SendError) as raised:
            await sender.send(get(), to(server), timeout_s=0.3)
        assert time.monotonic() - started < 5
    error = raised.value
    assert (error.error_type, error.sent) == (ErrorType.TIMEOUT, True)
    assert error.response is not None
    assert (error.response.status, error.response.complete) == (200, False)
    assert 0 < error.response.body_size < 1000
    assert error.response.body == b"x" * error.response.body_size


async def test_the_deadline_bounds_a_head_that_never_ends(sender):
    async def script(talk):
        await talk.head()
        while True:
            await talk.say(b"X")
            await asyncio.sleep(0.01)

    async with RawServer(script) as server:
        with pytest.raises(SendError) as raised:
            await sender.send(get(), to(server), timeout_s=0.3)
    assert raised.value.error_type in (ErrorType.TIMEOUT, ErrorType.PROTOCOL_ERROR)


async def test_a_server_that_never_accepts_times_out_without_having_been_sent_to():
    """A full backlog: the handshake of the kernel never ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        sender = Sender(connect_timeout_s=0.3)
        origin = Origin("http", "target.test", port, ("127.0.0.1",))
        with pytest.raises(SendError, match=r"connecting to 127\.0\.0\.1") as raised:
            await sender.send(get(b"POST"), origin)
        assert (raised.value.error_type, raised.value.sent) == (ErrorType.TIMEOUT, False)
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 1001 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * (2 * MAX_HEAD_BYTES),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: 1\r\n" * 1001 + b"\r\n",
    ],
)
async def test_what_is_not_http_is_a_protocol_error(sender, answer):
    async with RawServer(saying(answer, close=False)) as server:
        with pytest.raises(SendError) as raised:
            await sender.send(get(), to(server), timeout_s=10)
    assert (raised.value.error_type, raised.value.sent) == (ErrorType.PROTOCOL_ERROR, True)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"", None),
        (b"HTTP/1.1 20", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"abc"),
    ],
)
async def test_an_answer_that_breaks_off_is_an_error_with_what_was_seen(sender, answer, seen):
    async with RawServer(saying(answer)) as server:
        with pytest.raises(SendError) as raised:
            await sender.send(get(), to(server))
    assert raised.value.error_type is ErrorType.CONNECTION_RESET
    assert (raised.value.response and raised.value.response.body) == seen


async def test_a_reset_is_no_end_of_a_close_delimited_body(sender):
    async def script(talk):
        await talk.head()
        await talk.say(b"HTTP/1.1 200 OK\r\n\r\nabc")
        sock = talk.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        talk.reset()

    async with RawServer(script) as server:
        with pytest.raises(SendError, match="reset"):
            await sender.send(get(), to(server))


async def test_a_refused_connection_was_not_sent_to(sender):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        origin = Origin("http", "target.test", taken.getsockname()[1], ("127.0.0.1",))
        with pytest.raises(SendError, match="refused") as raised:
            await sender.send(get(b"POST"), origin)
    assert (raised.value.error_type, raised.value.sent) == (ErrorType.CONNECTION_RESET, False)


async def test_the_next_address_is_tried_when_one_refuses(sender):
    async with RawServer(answering) as server:
        got = await sender.send(get(b"POST"), to(server, addresses=("::1", "127.0.0.2", "127.0.0.1")))
        assert got.status == 200
        assert got.server.ip == "127.0.0.1"


async def test_cancelling_closes_the_connection(sender):
    gone = asyncio.Event()

    async def script(talk):
        await talk.head()
        arrived.set()
        await talk.rest()
        gone.set()

    arrived = asyncio.Event()
    async with RawServer(script) as server, asyncio.timeout(10):
        task = asyncio.create_task(sender.send(get(), to(server)))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone.wait()


async def test_many_at_once_get_their_own_answers(sender):
    async def script(talk):
        while True:
            head = await talk.head()
            name = head.split(b" ")[1]
            await talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(name), name))

    async with RawServer(script) as server:
        targets = [b"/%d" % number for number in range(300)]
        limit = asyncio.Semaphore(16)

        async def one(target):
            async with limit:
                return (await sender.send(get(target=target), to(server))).body

        assert await asyncio.gather(*map(one, targets)) == targets
        assert len(server.talks) <= 16
