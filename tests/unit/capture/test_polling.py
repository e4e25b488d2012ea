"""What a poll of the API leaves behind."""

import asyncio
import gc
import socket
import ssl
import threading
from collections.abc import Iterator

import httpx
import pytest

from megido_capture.configuration import source as configsource


@pytest.fixture
def nothing_listens() -> Iterator[str]:
    with socket.socket() as bound:  # bound and not listening: connects are refused
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


def test_polls_share_one_tls_context(nothing_listens: str) -> None:
    """Each would hold 0.7 MB until a collection, and a quiet node collects once in many minutes."""
    gc.disable()
    try:
        poll(nothing_listens)
        known = contexts()  # held, so that no new one gets the place of one that other tests left behind
        for _ in range(3):
            poll(nothing_listens)
        assert [found for found in contexts() if not any(found is one for one in known)] == []
    finally:
        gc.enable()


def test_the_end_of_a_loop_waits_for_no_api() -> None:
    """One that accepts and says nothing held the process for seconds after it had stopped, one that trickles longer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        async def ask_and_stop() -> socket.socket:
            asking = asyncio.create_task(
                configsource._aside(lambda: configsource.fetch(url, "browser", "capture-0", {}))
            )
            client, _ = await asyncio.to_thread(silent.accept)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            return client

        client = asyncio.run(ask_and_stop())
        polls = [thread for thread in threading.enumerate() if thread.name == "poll"]
        assert polls  # it asks still, and the loop has ended
        client.close()
        for thread in polls:
            thread.join(20)
            assert not thread.is_alive()


async def test_what_a_poll_raises_is_raised_where_it_is_awaited() -> None:
    def failing() -> None:
        raise httpx.ConnectError("refused")

    with pytest.raises(httpx.ConnectError, match="refused"):
        await configsource._aside(failing)


def poll(url: str) -> None:
    with pytest.raises(httpx.ConnectError):
        configsource.fetch(url.rstrip("/"), "browser", "capture-0", {})


def contexts() -> list[ssl.SSLContext]:
    # `type`, not `isinstance`: the latter asks the target of each weak proxy, which may be gone.
    return [found for found in gc.get_objects() if issubclass(type(found), ssl.SSLContext)]
