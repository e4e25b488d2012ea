"""The forwarder's way to Kafka, and its process."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megido_shared.bus.base import Outgoing
from megido_shared.bus.forwarder import KafkaShipper
from megido_shared.bus.forwarder_child import ForwarderChild
from megido_shared.bus.local import Journal, group_is_live
from megido_shared.bus.topics import FLOWS, Topic
from megido_shared.datadir import DataDir
from megido_shared.errors import Unavailable
from tests.support.waiting import until


class Emptied:
    """A Kafka that goes away and comes back without its topics. The producer's handle stays the same."""

    def __init__(self) -> None:
        self.away = False
        self.known: set[str] = set()
        self.stored: list[bytes] = []

    async def create_topics(self, topics: Sequence[Topic]) -> list[str]:
        new = [topic.name for topic in topics if topic.name not in self.known]
        self.known.update(new)
        return new

    async def producer(self, name: str, *, ordered: bool) -> "Emptied":
        assert ordered
        return self

    async def close(self) -> None:
        """As a producer's."""

    async def append(self, records: Sequence[Outgoing]) -> None:
        if self.away or any(record.topic not in self.known for record in records):
            raise Unavailable("nobody there, or no such topic")
        self.stored += [record.value for record in records]


async def test_topics_are_made_again_when_another_kafka_answers_after_an_outage() -> None:
    kafka: Any = Emptied()
    shipper = KafkaShipper(kafka)
    await shipper.ship([Outgoing(FLOWS.name, b"k", b"one")])
    kafka.known, kafka.away = set(), True
    with pytest.raises(Unavailable):
        await shipper.ship([Outgoing(FLOWS.name, b"k", b"two")])
    kafka.away = False
    with pytest.raises(Unavailable, match="before this one failed"):
        await shipper.ship([Outgoing(FLOWS.name, b"k", b"three")])
    await shipper.begin_again()
    await shipper.ship([Outgoing(FLOWS.name, b"k", b"two")])
    assert kafka.stored == [b"one", b"two"]


def test_a_child_finds_our_packages_and_nothing_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a checkout that is not installed: the packages are on this process's path only."""
    (tmp_path / "random.py").write_text("raise SystemExit('not mine')")
    installed = tmp_path / "site"
    installed.mkdir()
    for folder in map(Path, sys.path):
        for entry in folder.iterdir() if folder.name == "site-packages" else ():
            if "megido" not in entry.name.lower() and entry.suffix != ".pth":
                (installed / entry.name).symlink_to(entry)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.chdir(tmp_path)
    data = DataDir(tmp_path / "data")
    child = ForwarderChild(data, kafka="", api_url="http://127.0.0.1:1")
    child.tick(0.0)
    try:
        deadline = time.monotonic() + 30
        while not group_is_live(data, "forwarder"):
            assert child._child is not None and child._child.poll() is None, "it ended"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.stop()


def test_a_child_that_does_not_end_is_killed_in_time(tmp_path: Path) -> None:
    child = ForwarderChild(DataDir(tmp_path), kafka="127.0.0.1:1")
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    child._child = process  # type: ignore[assignment]
    began = time.monotonic()
    child.stop(0.2)
    assert time.monotonic() - began < 5 and process.returncode == -signal.SIGKILL
    process.stdout.close()


def test_what_a_child_says_goes_through_the_log_and_not_to_the_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    journal = Journal.open(DataDir(tmp_path / "data"), "capture")
    assert journal.append(FLOWS.name, b"k", b"v")
    child = ForwarderChild(DataDir(tmp_path / "data"), kafka="127.0.0.1:1")
    with caplog.at_level("INFO"):
        child.tick(0.0)
        try:
            until(lambda: "trying again" in caplog.text, "it has said that nobody is there")
        finally:
            child.stop()
        bad = ForwarderChild(DataDir(tmp_path / "data"), kafka="", api_url="nowhere")
        bad.tick(0.0)
        until(lambda: "must begin with http" in caplog.text, "why it ended")
        bad.stop()
    found = [record for record in caplog.records if record.name == "megido.forwarder"]
    assert found and all(record.levelname == "WARNING" for record in found), "an error would end mitmproxy's start"
    assert not any("WARNING" in record.getMessage() for record in found), "one prefix, not two"
    journal.close()
    assert capfd.readouterr().err == ""
