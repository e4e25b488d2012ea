"""`megido up --workers`: several processes behind one of its children."""

import os
import re
import signal
import urllib.request

import pytest

from megido.launcher.options import UpOptions
from tests.e2e.stack import Stack
from tests.integration.launcher.test_up import processes, site, stack, through_proxy
from tests.support.waiting import until

__all__ = ["site", "stack"]

pytestmark = pytest.mark.timeout(300)


def workers(stack: Stack) -> list[int]:
    return sorted(pid for pid, command in processes(stack).items() if "workers.worker" in command)


def parent(stack: Stack) -> int:
    found = processes(stack).items()
    (pid,) = [pid for pid, command in found if "launcher.child" in command and "megido_capture" in command]
    return pid


def both(stack: Stack, before: set[int]) -> bool:
    found = workers(stack)
    return len(found) == 2 and not before & set(found)


def test_workers_under_the_launcher(stack: Stack, site: str) -> None:
    stack.options = ["--workers", "2"]
    stack.start()
    assert f"{stack.proxy} (2 workers)" in stack.screen()
    for number in range(20):
        assert through_proxy(stack, f"{site}/dealt/{number}") == b"hello"
    stack.wait_for("/dealt/", count=20)
    shown = re.search(r"capture (http://\S+/metrics)", stack.screen())
    assert shown is not None
    with urllib.request.urlopen(shown[1], timeout=20) as answer:
        metrics = answer.read().decode()
    for node in ("capture-0", "capture-1"):
        assert f'megido_capture_events_total{{name="completed",node="{node}"}}' in metrics

    first, second = workers(stack)
    os.kill(first, signal.SIGKILL)
    until(lambda: len(found := workers(stack)) == 2 and first not in found, "the worker is back", seconds=30)
    assert second in workers(stack)
    assert "capture ended" not in stack.screen(), "the group's own affair"

    before = {parent(stack), *workers(stack)}
    os.kill(parent(stack), signal.SIGKILL)
    until(lambda: both(stack, before), "parent and workers are back", seconds=60)
    assert "capture ended (killed by signal 9); starting it again" in stack.screen()
    until(lambda: _answers(stack, f"{site}/again"), "the proxy is back", seconds=30)
    stack.wait_for("/again")
    through_proxy(stack, f"{site}/last")
    assert stack.stop() == 0
    assert not processes(stack)
    assert "is killed" not in stack.screen()


def _answers(stack: Stack, url: str) -> bool:
    try:
        return through_proxy(stack, url) == b"hello"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "workers"), [((), 1), (("--workers", "3"), 3), (("--workers=4",), 4), (("--workers", "many"), 1)]
)
def test_how_many_workers_were_asked_for(arguments: tuple[str, ...], workers: int) -> None:
    """What is none is capture's to refuse."""
    assert UpOptions.of(data_dir="/tmp/x", env={}, capture_arguments=arguments).workers == workers
