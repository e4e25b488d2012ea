"""Every row of the table of errors happens against real sockets, and leaves exactly one event."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from megido_shared.events import AuthAttempted, FlowCompleted, FlowFailed
from tests.integration.capture import harness
from tests.integration.capture.breakage import SEEN, Place, says, sending, speaks
from tests.integration.capture.error_rows import OK, ROWS, Row, table
from tests.integration.capture.harness import Proxy, body

ROOT = Path(__file__).resolve().parents[3]
CASES = [pytest.param(row, over, id=f"{row.cause}-{over}") for row in ROWS for over in row.gets]

type Starter = Callable[[tuple[str, ...]], Proxy]


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, trusted: str) -> Iterator[Starter]:
    """Proxies with short deadlines, one for each set of flags."""
    started: dict[tuple[str, ...], Proxy] = {}

    def get(options: tuple[str, ...]) -> Proxy:
        if options not in started:
            flags = ["--connection-timeout", "3", "--transfer-timeout", "3", *options]
            flags += ["--set", f"ssl_verify_upstream_trusted_ca={trusted}"]
            started[options] = harness.start(tmp_path_factory.mktemp("proxy"), *flags)
        return started[options]

    yield get
    assert [found.stop() for found in started.values()] == [0] * len(started)


@pytest.mark.parametrize(("row", "over"), CASES)
async def test_error(impatient: Starter, authority: trustme.CA, row: Row, over: str) -> None:
    async with row.server(over, authority) as (host, port):
        proxy = impatient(tuple(option.format(port=port) for option in row.options)).from_now()
        got = await row.client(Place(proxy, over, port, authority, host))
        assert got == row.gets[over]
        await proxy.until(lambda events: any(event.seq for event in events))
        found = await fenced(proxy, authority) if not row.options else await proxy.events()
    [event] = [event for event in found if event.seq]
    assert isinstance(event, row.recorded_as(over)), event
    assert event.client.ip == "127.0.0.1"
    if isinstance(event, AuthAttempted):
        assert not event.success
        return
    assert (event.failure.error_type, bool(event.failure.stack_trace)) == (row.error, row.trace), event.failure
    assert row.says in event.failure.message
    assert "secret" not in event.failure.message and event.failure.message
    if isinstance(event, FlowFailed):
        assert (event.request.host, event.request.port) == (host, port)
        assert body(found, event, "request") == SEEN[: row.request] and event.request.body.size == row.request
        if event.response is not None:
            assert body(found, event) == SEEN[: row.response] and event.response.body.size == row.response
        assert bool(event.response) or not row.response
    else:
        shown = host if port == 443 else f"{host}:{port}"
        assert event.url == ("" if over == "http" else f"https://{shown}/")


async def fenced(proxy: Proxy, authority: trustme.CA) -> list[Any]:
    """The events up to those of an exchange that begins now, without it: a second event of an error is among them."""
    async with speaks(says(OK + b"Content-Length: 0\r\n\r\n"))("http", authority) as (host, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(f"GET http://{host}:{port}/fence HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
    found = await proxy.until(lambda events: any(map(_is_fence, events)))
    return [event for event in found if not _is_fence(event)]


def _is_fence(event: Any) -> bool:
    return isinstance(event, FlowCompleted) and event.request.target == b"/fence"


CHUNKS_WITH_TRAILERS = b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"


async def test_trailers_of_http1_are_dropped_and_nobody_hangs(impatient: Starter, authority: trustme.CA) -> None:
    proxy = impatient(()).from_now()
    answers = speaks(says(OK + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS_WITH_TRAILERS, then="wait"))
    async with answers("http", authority) as (host, port):
        place = Place(proxy, "http", port, authority, host)
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert await sending(head + CHUNKS_WITH_TRAILERS)(place) == "200"
        found = await proxy.until(lambda events: any(isinstance(event, FlowCompleted) for event in events))
    [event] = [event for event in found if event.seq]
    assert (event.request.body.size, event.response.body.size) == (3, 3)


def test_the_table_is_in_the_documentation() -> None:
    assert table() in (ROOT / "docs/errors.md").read_text(), "python -m tests.integration.capture.error_rows prints it"


def test_the_table_has_every_type_but_other() -> None:
    """OTHER is for what nobody foresaw."""
    assert {row.error.value for row in ROWS} == {
        "CONNECTION_RESET", "TIMEOUT", "AUTH_FAILURE", "PROTOCOL_ERROR", "SSL_ERROR", "DNS_ERROR",
    }  # fmt: skip
