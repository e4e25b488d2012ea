"""The journal: recovery, caps, freeing, what a full disk and a kill may do."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megido_shared import events, ids
from megido_shared.bus.base import Stream
from megido_shared.bus.local import Journal, groups
from megido_shared.bus.local.groups import Group, Membership
from megido_shared.bus.local.segments import OVERHEAD, Entry, list_segments, scan
from megido_shared.bus.topics import FLOWS, REPLAY_RESULTS
from megido_shared.datadir import DataDir
from megido_shared.errors import ConfigurationError
from megido_shared.testing import a_completed_flow

T = FLOWS.name
RECORD = OVERHEAD + 1 + 1000
"""The size of what `fill` appends."""


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


def fill(journal: Journal, count: int, topic: str = T) -> int:
    """How many of `count` records were taken."""
    return sum(journal.append(topic, b"k", bytes(1000), journal.next_seq()) for _ in range(count))


def a_heartbeat(captured: int) -> events.NodeStatus:
    return events.NodeStatus(
        event_id=ids.new_id(), node="capture-0", epoch=bytes(16), time_us=0, state="running", version="", pid=1,
        listen="", captured=captured,
    )  # fmt: skip


def segments(data: DataDir, node: str, topic: str = T) -> list[Path]:
    return [data.bus / node / name.file for name in list_segments(data.bus / node).get(topic, [])]


def wait(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_appended_is_read_back(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    flow = a_completed_flow(seq=journal.next_seq())
    assert journal.publish(flow)
    (record,) = journal.read_back(T)
    assert (record.key, events.decode(record.value)) == (flow.flow_id, flow)
    assert record.stream == Stream(journal.epoch.hex(), T, 0)
    assert list(journal.read_back("other")) == []
    journal.close()


def test_slots_are_numbered_and_taken_again_with_their_epoch(data: DataDir) -> None:
    one, two = Journal.open(data, "capture"), Journal.open(data, "capture")
    assert (one.node, two.node) == ("capture-0", "capture-1")
    assert one.epoch != two.epoch
    fill(one, 1)
    one.close()
    again = Journal.open(data, "capture")
    assert (again.node, again.epoch) == ("capture-0", one.epoch)
    again.close()
    two.close()


def test_directories_are_0700_and_files_0600(data: DataDir) -> None:
    before = os.umask(0)
    try:
        journal = Journal.open(data, "capture")
        fill(journal, 1)
        Group(data, "ingest").pin([T])
        journal.close()
    finally:
        os.umask(before)
    for path in [data.root, *data.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_seq_goes_on_after_a_restart_whichever_topic_had_the_last(data: DataDir) -> None:
    for last in (T, "megido.errors", "megido.nodes"):
        journal = Journal.open(data, "capture")
        for topic in (T, "megido.errors", "megido.nodes"):
            if topic != last:
                fill(journal, 3, topic)
        fill(journal, 5, last)
        journal.append(last, b"k", b"no terminal record")
        expected = journal.next_seq()
        journal.close()
        again = Journal.open(data, "capture")
        assert again.next_seq() == expected
        fill(again, 1, last)
        again.close()


def test_seq_goes_on_when_everything_but_the_newest_segments_was_freed(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=3000)
    fill(journal, 20)
    seq = journal.next_seq()
    group = Group(data, "ingest")
    group.pin([T])
    group.write_ack(Stream(journal.epoch.hex(), T, 0), 10**9)
    journal.free()
    journal.close()
    assert len(segments(data, "capture-0")) == 1
    again = Journal.open(data, "capture")
    assert again.next_seq() >= seq
    again.close()


def test_a_start_begins_a_new_segment_behind_a_torn_tail(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    fill(journal, 3)
    journal.close()
    (old,) = segments(data, "capture-0")
    with old.open("r+b") as file:
        file.truncate(3 * RECORD - 7)
    again = Journal.open(data, "capture")
    assert again.next_seq() == 3, "the torn record's seq is not known any more"
    assert [path.name.split(".")[2] for path in segments(data, "capture-0")] == [
        f"{0:020d}",
        f"{3 * RECORD - 7:020d}",
    ]
    assert fill(again, 1) == 1
    assert len(list(again.read_back(T))) == 3
    again.close()


def test_starts_without_records_leave_no_trail_of_segments(data: DataDir) -> None:
    for _ in range(5):
        journal = Journal.open(data, "capture")
        journal.close()
    assert segments(data, "capture-0") == []
    journal = Journal.open(data, "capture")
    fill(journal, 1)
    journal.close()
    for _ in range(5):
        Journal.open(data, "capture").close()
    assert len(segments(data, "capture-0")) == 2


def test_at_the_cap_the_newest_is_dropped_and_counted(data: DataDir) -> None:
    journal = Journal.open(data, "capture", cap_bytes=10 * RECORD)
    assert fill(journal, 15) == 10
    assert not journal.append(T, b"k", bytes(1000))
    assert (journal.dropped, journal.dropped_terminal, dict(journal.drops)) == (6, 5, {"cap": 6})
    assert journal.used_bytes == 10 * RECORD
    assert len(list(journal.read_back(T))) == 10
    journal.close()


def test_a_consumer_that_reads_on_makes_room_again_without_a_restart(data: DataDir) -> None:
    journal = Journal.open(data, "capture", cap_bytes=10 * RECORD)
    group = Group(data, "ingest")
    group.pin([T])
    assert fill(journal, 12) == 10
    group.write_ack(Stream(journal.epoch.hex(), T, 0), 10 * RECORD)
    wait(lambda: journal.used_bytes == 0)
    assert fill(journal, 10) == 10
    assert journal.dropped == 2
    journal.close()


def test_the_last_quarter_of_the_cap_is_a_reserve(data: DataDir) -> None:
    journal = Journal.open(data, "capture", cap_bytes=8 * RECORD)
    assert fill(journal, 5) == 5
    assert not journal.is_nearly_full
    assert fill(journal, 1) == 1
    assert journal.is_nearly_full
    assert fill(journal, 3) == 2
    journal.cap_bytes = 20 * RECORD
    assert not journal.is_nearly_full
    assert fill(journal, 1) == 1
    journal.close()


def test_a_heartbeat_tells_the_next_life_of_numbers_whose_records_were_dropped(data: DataDir) -> None:
    journal = Journal.open(data, "capture", cap_bytes=10 * RECORD)
    assert fill(journal, 15) == 10
    journal.cap_bytes *= 2
    event = a_heartbeat(captured=journal.last_seq)
    assert journal.publish(event)
    journal.close()
    for _ in range(2):  # the second start finds it behind a segment without records
        journal = Journal.open(data, "capture")
        assert journal.last_seq == 15
        journal.close()


def test_what_was_dropped_is_known_after_a_restart_and_its_numbers_are_not_given_again(data: DataDir) -> None:
    journal = Journal.open(data, "capture", cap_bytes=10 * RECORD)
    assert fill(journal, 15) == 10
    figures = journal.figures()
    assert (figures["dropped_terminal"], figures["dropped_terminal:cap"]) == (5, 5)
    journal.close()
    for drops in (7, 9):  # a start without drops of its own forgets none
        journal = Journal.open(data, "capture", cap_bytes=10 * RECORD)
        assert fill(journal, 2) == 0
        assert journal.last_seq == 10 + drops
        assert (journal.dropped, journal.dropped_terminal) == (2, drops)
        journal.close()


def test_damaged_counts_of_drops_do_not_keep_a_node_from_starting(data: DataDir) -> None:
    journal = Journal.open(data, "capture", cap_bytes=10 * RECORD)
    fill(journal, 15)
    journal.close()
    (data.bus / "capture-0" / "drops").write_bytes(b"\0\0")
    journal = Journal.open(data, "capture")
    assert (journal.last_seq, journal.dropped_terminal) == (10, 0)
    journal.close()


def test_figures_say_what_no_reader_is_done_with(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    fill(journal, 3)
    fill(journal, 1, "megido.replay.results")
    assert journal.figures()["journal_waiting"] == 3 * RECORD, "nobody reads"
    group = Group(data, "ingest")
    group.pin([T])
    group.write_ack(Stream(journal.epoch.hex(), T, 0), RECORD)
    assert journal.figures()["journal_waiting"] == 2 * RECORD
    group.write_ack(Stream(journal.epoch.hex(), T, 0), 3 * RECORD)
    assert journal.figures()["journal_waiting"] == 0
    journal.close()


def test_too_large_and_closed_are_drops_with_their_reason(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    assert not journal.append(T, bytes(70_000), b"")
    assert not journal.append(T, b"", bytes(17 << 20))
    assert not journal.append("no/topic", b"", b"")
    journal.close()
    assert not journal.append(T, b"", b"")
    assert dict(journal.drops) == {"too_large": 2, "disk": 1, "closed": 1}


@contextlib.contextmanager
def full_disk(after: int) -> Iterator[None]:
    """Files of this process may not grow beyond `after` bytes: the kernel then writes short, and at the limit
    refuses, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_short_write_is_taken_back_and_counted_and_writing_goes_on(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    with full_disk(after=5 * RECORD + 100):
        assert fill(journal, 8) == 5
    assert segments(data, "capture-0")[0].stat().st_size == 5 * RECORD, "no trace of the short write"
    assert dict(journal.drops) == {"short_write": 3}
    assert fill(journal, 4) == 4
    assert len(list(journal.read_back(T))) == 9
    assert journal.used_bytes == 9 * RECORD
    journal.close()


def test_a_full_disk_drops_counts_and_recovers_without_a_restart(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    with full_disk(after=5 * RECORD):
        assert fill(journal, 8) == 5
    assert dict(journal.drops) == {"disk": 3}
    assert fill(journal, 4) == 4
    journal.close()


def test_on_a_full_disk_what_is_acknowledged_is_freed_though_the_cap_is_far(data: DataDir) -> None:
    journal = Journal.open(data, "capture")
    group = Group(data, "ingest")
    group.pin([T])
    with full_disk(after=5 * RECORD):
        assert fill(journal, 8) == 5
        group.write_ack(Stream(journal.epoch.hex(), T, 0), 5 * RECORD)
        wait(lambda: journal.used_bytes == 0)
        assert fill(journal, 4) == 4
    assert dict(journal.drops) == {"disk": 3}
    assert len(segments(data, "capture-0")) == 1
    journal.close()


def test_no_descriptor_for_the_next_segment_means_going_on_in_this_one(
    data: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    journal = Journal.open(data, "capture", segment_bytes=3 * RECORD)
    assert fill(journal, 3) == 3
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(OSError) as refused:
            os.open("/dev/null", os.O_RDONLY)
        assert refused.value.errno == errno.EMFILE
        assert fill(journal, 3) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(segments(data, "capture-0")) == 1
    assert fill(journal, 1) == 1
    assert len(segments(data, "capture-0")) == 2
    journal.close()


def test_segments_are_freed_at_the_minimum_over_the_pinning_groups(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=2 * RECORD)
    fill(journal, 10)
    stream = Stream(journal.epoch.hex(), T, 0)
    journal.free()
    assert len(segments(data, "capture-0")) == 5, "nobody has read anything"
    slow, fast, free = (Group(data, name) for name in ("slow", "fast", "free"))
    slow.pin([T])
    fast.pin([T])
    free.write_ack(stream, 0)
    fast.write_ack(stream, 10 * RECORD)
    journal.free()
    assert len(segments(data, "capture-0")) == 5, "one pinning group has acknowledged nothing"
    slow.write_ack(stream, 4 * RECORD + 1)
    segments(data, "capture-0")[0].unlink()  # somebody else was faster
    journal.free()
    assert [path.name.split(".")[2] for path in segments(data, "capture-0")] == [
        f"{n * RECORD:020d}" for n in (4, 6, 8)
    ]
    assert journal.used_bytes == 6 * RECORD
    slow.write_ack(stream, 10 * RECORD)
    journal.free()
    assert len(segments(data, "capture-0")) == 1, "the newest stays"
    journal.close()


def test_a_damaged_acknowledgement_frees_nothing(data: DataDir) -> None:
    journal = Journal.open(data, "capture", segment_bytes=2 * RECORD)
    fill(journal, 10)
    group = Group(data, "ingest")
    group.pin([T])
    stream = Stream(journal.epoch.hex(), T, 0)
    group.write_ack(stream, 3 * RECORD)
    (path,) = (group.path / "acks").iterdir()
    good = path.read_bytes()
    for at in range(len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert group.ack(stream) in (None, 3 * RECORD)
    journal.close()


def test_a_group_that_never_comes_back_stops_pinning_while_another_one_reads(
    data: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(data, "capture", segment_bytes=2 * RECORD)
    fill(journal, 10)
    stream = Stream(journal.epoch.hex(), T, 0)
    gone, reading = Group(data, "gone"), Group(data, "reading")
    gone.pin([T])
    reading.pin([T])
    Membership(gone).close()
    reading.write_ack(stream, 10 * RECORD)
    member = Membership(reading)
    journal.free()
    assert len(segments(data, "capture-0")) == 5, "it may only be restarting"
    hours_ago = time.time() - 2 * groups.ABANDONED_AFTER
    os.utime(gone.path / "members", (hours_ago, hours_ago))
    member.close()
    journal.free()
    assert len(segments(data, "capture-0")) == 5, "nobody reads: then everybody is waited for"
    member = Membership(reading)
    journal.free()
    assert len(segments(data, "capture-0")) == 1
    member.close()
    journal.close()


def test_topics_that_nobody_pins_keep_a_bounded_size(data: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "UNPINNED_BYTES", 4 * RECORD)
    journal = Journal.open(data, "replayer", segment_bytes=2 * RECORD)
    fill(journal, 20, REPLAY_RESULTS.name)
    fill(journal, 20, T)
    journal.free()
    assert len(segments(data, "replayer-0", REPLAY_RESULTS.name)) == 4, "the bound and the newest"
    assert len(segments(data, "replayer-0", T)) == 10, "what ingest stores waits for ingest"
    journal.close()


@pytest.mark.parametrize("name", ["", "a/b", "..x/", "a b"])
def test_a_bad_name_is_refused(data: DataDir, name: str) -> None:
    with pytest.raises(ConfigurationError):
        Journal.open(data, name)


def test_a_data_directory_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        Journal.open(DataDir(path), "capture")


WRITER = """
import sys
from pathlib import Path
from megido_shared.bus.local import Journal
from megido_shared.datadir import DataDir

journal = Journal.open(DataDir(Path(sys.argv[1])), "capture", segment_bytes=200_000)
print("epoch", journal.epoch.hex(), flush=True)
while True:
    seq = journal.next_seq()
    value = seq.to_bytes(8) * (1 + seq * 7919 % 1500)
    if journal.append("megido.flows", b"k", value, seq):
        print(seq, flush=True)
"""


def test_kill_9_loses_nothing_that_append_returned_true_for(data: DataDir) -> None:
    told: list[int] = []
    epochs = set()
    for round_ in range(12):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(data.root)], stdout=subprocess.PIPE, text=True)
        assert child.stdout
        epochs.add(child.stdout.readline())
        told += [int(child.stdout.readline()) for _ in range(50 + 37 * round_)]
        child.kill()
        told += [int(line) for line in child.stdout.read().splitlines() if line.isdigit()]
        child.wait()
        child.stdout.close()
    assert len(epochs) == 1
    stored: list[int] = []
    for path in segments(data, "capture-0"):
        name = next(name for name in list_segments(path.parent)[T] if name.file == path.name)
        for entry in scan(path.read_bytes(), name.marker):
            if isinstance(entry, Entry):
                assert entry.value == entry.seq.to_bytes(8) * (1 + entry.seq * 7919 % 1500)
                stored.append(entry.seq)
            else:
                assert entry.kind == "torn"
    assert stored == sorted(set(stored)), "each seq once, rising through all the restarts"
    assert set(told) <= set(stored)
