"""`megido up` stops while a client waits for an answer: no service is killed before its own budget is over, a second
signal reaches them, and nothing is left behind."""

import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from tests.e2e.stack import Stack
from tests.integration.launcher.test_up import processes, stack
from tests.support.waiting import until

__all__ = ["stack"]

pytestmark = pytest.mark.timeout(300)

DRAINED = re.compile(r"stopped in [\d.]+ of [\d.]+ s \(drain ([\d.]+)")


@contextmanager
def waiting(stack: Stack) -> Iterator[None]:
    """A client through the proxy whose server never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/never"

        def ask() -> None:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": stack.proxy}))
            try:
                opener.open(url, timeout=120).close()
            except OSError:
                return  # as it must end

        client = Thread(target=ask, daemon=True)
        client.start()
        connection, _ = server.accept()
        with connection:
            yield
        client.join(30)
        assert not client.is_alive()


def drains(stack: Stack) -> list[float]:
    """Seconds of each drain that the log tells of."""
    return [float(spent) for spent in DRAINED.findall((stack.data_dir / "service-logs" / "capture.log").read_text())]


def test_each_service_has_its_budget_and_a_second_signal_reaches_it(stack: Stack) -> None:
    stack.options = ["--workers", "2"]
    stack.start()
    with waiting(stack):
        assert stack.stop() == 0
    assert not processes(stack)
    first = drains(stack)
    assert len(first) == 2 and max(first) >= 9.9, "one worker had a flow, and all of its time"

    stack.start()
    with waiting(stack):
        assert stack.process is not None
        stack.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in stack.screen(), "it stops")
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(60) == 0
    assert not processes(stack)
    assert "killed" not in stack.screen()
    second = drains(stack)[len(first) :]
    assert len(second) == 2 and max(second) < 9.9
    stack.start()
    flows = stack.wait_for("/never", 2)
    assert [flow["status_code"] for flow in flows] == [None, None]
    assert stack.stop() == 0
