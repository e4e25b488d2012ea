"""The log tree as the founding document describes it, written from a real feed."""

import base64
import errno
import gzip
import json
import os
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from megido_shared import events, ids
from megido_shared.db import tables
from megido_shared.logfiles import cleanup, recent
from tests.integration.jsonlogs.rows import MOMENT, Store, a_message, an_attempt, an_error, listeners
from tests.integration.jsonlogs.running import files, until, write_all, writing


def read(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / name).read_text())
    return found


async def test_a_flow_becomes_a_request_and_a_response(store: Store, root: Path) -> None:
    body, answer = b'{"name": "\xc3\xa9va"}', b"\x00\x01\xff"
    flow_id = store.flow(
        method="POST",
        request_body=body,
        response_body=answer,
        request_pairs=[(b"Host", b"api.example.com"), (b"X-Two", b"1"), (b"x-two", b"2"), (b"X-Two", b"3")],
    )
    await write_all(store, root)
    assert files(root) == ["requests/20260213/143052_123456_POST.json", "responses/20260213/143052_345678_200.json"]
    request = read(root, "requests/20260213/143052_123456_POST.json")
    assert request["timestamp"] == "2026-02-13T14:30:52.123456"
    assert request["type"] == "request"
    assert (request["id"], request["flow_id"]) == (1, flow_id.hex)
    assert request["url"] == "https://api.example.com/users"
    assert (request["method"], request["protocol"]) == ("POST", "HTTPS")
    assert (request["source_ip"], request["user_agent"]) == ("192.168.1.100", "test/1.0")
    assert request["headers"] == {"Host": "api.example.com", "X-Two": "3", "x-two": "2"}
    assert request["raw_headers"] == [["Host", "api.example.com"], ["X-Two", "1"], ["x-two", "2"], ["X-Two", "3"]]
    assert (request["body"], request["body_encoding"]) == (body.decode(), "text")
    response = read(root, "responses/20260213/143052_345678_200.json")
    assert (response["type"], response["request_id"], response["status_code"]) == ("response", 1, 200)
    assert (response["response_time"], response["response_size"]) == (222.222, 3)
    assert (response["cached"], response["error_message"]) == (False, None)
    assert response["body_encoding"] == "base64"
    assert base64.b64decode(response["body"]) == answer


async def test_a_compressed_text_is_readable(store: Store, root: Path) -> None:
    plain = b"hello " * 100
    pairs = [(b"Content-Encoding", b"gzip"), (b"Content-Type", b"text/plain")]
    store.flow(response_pairs=pairs, response_body=gzip.compress(plain))
    await write_all(store, root)
    response = recent(root, "responses")[0]
    assert response["body"] == plain.decode()
    assert (response["body_encoding"], response["decoded_from"]) == ("text", "gzip")


async def test_messages_errors_and_attempts_have_their_places(store: Store, root: Path) -> None:
    flow_id = ids.to_uuid(ids.new_id())
    start = ids.time_ms(flow_id.bytes) // 1000
    store.row(tables.websocket_messages, **a_message(flow_id))
    store.row(
        tables.websocket_messages,
        **a_message(flow_id, direction="RECEIVE", message_type="BINARY", payload=b"\x00\xff", sequence=1),
    )
    store.row(tables.errors, **an_error())
    store.row(tables.auth_attempts, **an_attempt())
    store.row(tables.auth_attempts, **an_attempt(success=True, failure_reason=""))
    await write_all(store, root)
    folder = f"websockets/ws_{flow_id.hex}_{start}"
    assert files(root) == [
        "auth/20260213/143052_123456_FAILED.json",
        "auth/20260213/143052_123456_SUCCESS.json",
        "errors/20260213/143052_123456_TIMEOUT.json",
        "proxy_general.log",
        f"{folder}/143052_123456_RECEIVE_BINARY.json",
        f"{folder}/143052_123456_SEND_TEXT.json",
    ]
    assert read(root, f"{folder}/143052_123456_SEND_TEXT.json")["payload"] == "hello"
    binary = read(root, f"{folder}/143052_123456_RECEIVE_BINARY.json")
    assert (binary["payload"], binary["payload_encoding"], binary["payload_size"]) == ("00ff", "hex", 2)
    assert read(root, "errors/20260213/143052_123456_TIMEOUT.json")["error_message"] == "no answer within 30 s"
    assert read(root, "auth/20260213/143052_123456_FAILED.json")["username"] == "eve"


async def test_a_flow_that_is_stored_later_shows_up_within_a_second(store: Store, root: Path) -> None:
    async with writing(store, root) as writer:
        await until(lambda: listeners(store.url) == 1)
        for number in range(1, 4):
            store.flow(started_at=MOMENT + timedelta(seconds=number))
            last = store.last_seq()
            await until(lambda last=last: writer.position == last, seconds=5)
    assert len(files(root / "requests")) == 3


async def test_two_flows_of_one_microsecond_both_keep_their_file(store: Store, root: Path) -> None:
    first, second = store.flows([{}, {}])
    await write_all(store, root)
    names = [f"{stem}.json" for stem in ("143052_123456_GET", f"143052_123456_GET-{second.hex[-6:]}")]
    assert files(root / "requests" / "20260213") == sorted(names)
    assert read(root, f"requests/20260213/{names[0]}")["flow_id"] == first.hex
    assert read(root, f"requests/20260213/{names[1]}")["flow_id"] == second.hex


async def test_writing_again_changes_nothing(store: Store, root: Path) -> None:
    store.flows([{}, {}, {"method": "POST", "request_body": b"x"}])
    store.row(tables.errors, **an_error())
    await write_all(store, root)
    before = {name: ((root / name).read_bytes(), (root / name).stat().st_mtime_ns) for name in files(root)}
    store.forget(f"json-logs:{root}", 0)
    await write_all(store, root)
    assert {name: ((root / name).read_bytes(), (root / name).stat().st_mtime_ns) for name in files(root)} == before


async def test_half_files_of_a_kill_are_completed_under_the_same_names(store: Store, root: Path) -> None:
    store.flows([{}, {}])
    await write_all(store, root)
    whole = {name: (root / name).read_bytes() for name in files(root)}
    for name in whole:
        (root / name).write_bytes(whole[name][: len(whole[name]) // 2])
    store.forget(f"json-logs:{root}", 0)
    await write_all(store, root)
    assert {name: (root / name).read_bytes() for name in files(root)} == whole


async def test_a_flow_that_rises_is_rewritten_in_place(store: Store, root: Path) -> None:
    flow_id = store.flow(rank=events.Rank.STARTED, response_time_us=None)
    await write_all(store, root)
    assert files(root) == ["requests/20260213/143052_123456_GET.json"]
    assert read(root, files(root)[0])["state"] == "started"
    store.flow(flow_id=flow_id, rank=events.Rank.INTERRUPTED)
    await write_all(store, root)
    interrupted = ["requests/20260213/143052_123456_GET.json", "responses/20260213/143052_123456_200.json"]
    assert files(root) == interrupted
    store.flow(flow_id=flow_id, rank=events.Rank.COMPLETED, response_time_us=222_222)
    await write_all(store, root)
    assert files(root) == ["requests/20260213/143052_123456_GET.json", "responses/20260213/143052_345678_200.json"]
    assert read(root, files(root)[0])["state"] == "completed"


async def test_what_traffic_says_never_becomes_a_path(store: Store, root: Path, tmp_path: Path) -> None:
    store.flow(method="../../../../GET", response_pairs=[(b"X", b"y")])
    store.flow(method="", status=None)
    flow_id = ids.to_uuid(ids.new_id())
    store.row(tables.websocket_messages, **a_message(flow_id, connection_id="../../evil/../x", message_type="TE/XT"))
    store.row(tables.errors, **an_error(error_type="../X"))
    await write_all(store, root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["proxy"]
    assert len(files(root / "requests")) == 2
    for path in root.rglob("*"):
        assert path.resolve().is_relative_to(root)
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


async def test_a_folder_that_was_open_to_all_is_closed(store: Store, root: Path) -> None:
    (root / "requests").mkdir(parents=True, mode=0o755)
    store.flow()
    await write_all(store, root)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (root, root / "requests")} == {0o700}


async def test_a_posted_connection_keeps_one_folder(store: Store, root: Path) -> None:
    for seconds in (0, 5):
        flow_id = ids.to_uuid(ids.new_id())
        moment = MOMENT + timedelta(seconds=seconds)
        store.row(tables.websocket_messages, **a_message(flow_id, connection_id="ws_12345", occurred_at=moment))
        await write_all(store, root)
    assert [path.name for path in (root / "websockets").iterdir()] == [f"ws_12345_{int(MOMENT.timestamp())}"]
    assert len(files(root / "websockets")) == 2


async def test_the_general_log_tells_what_happened_once(store: Store, root: Path) -> None:
    flow_id = store.flow(status=101, protocol="WSS", url="wss://chat.example.com/room", method="GET")
    for direction in ("SEND", "RECEIVE"):
        store.row(
            tables.websocket_messages,
            **a_message(flow_id, direction=direction, message_type="CLOSE", payload=b"", close_code=1000),
        )
    store.row(tables.errors, **an_error(error_message="broken\r\n2026-02-13T00:00:00.000000 INFO all is well"))
    store.row(tables.errors, **an_error(error_type="AUTH_FAILURE", seq=0))
    store.row(tables.auth_attempts, **an_attempt())
    store.node(state="stopping")
    await write_all(store, root)
    store.forget(f"json-logs:{root}", 0)
    await write_all(store, root)
    lines = (root / "proxy_general.log").read_text().splitlines()
    texts = [line.partition(" ")[2] for line in lines]
    assert len(lines) == 6, lines
    for expected in (
        "INFO capture capture-0 listening on 127.0.0.1:8080 started, version 0.1.0",
        "INFO capture capture-0 listening on 127.0.0.1:8080 stopped",
        "INFO WebSocket opened wss://chat.example.com/room from 192.168.1.100",
        "INFO WebSocket closed wss://chat.example.com/room by client, code 1000, no reason given",
        "ERROR TIMEOUT https://slow.example.com/ from 192.168.1.100: broken\\r\\n2026-02-13T00:00:00.000000 INFO",
        "WARNING authentication failed from 10.0.0.9 as eve: wrong password",
    ):
        assert sum(text.startswith(expected) for text in texts) == 1, (expected, lines)


async def test_one_writer_a_log_root(store: Store, root: Path) -> None:
    async with writing(store, root) as first:
        store.flow()
        await until(lambda: first.position == 1)
        async with writing(store, root) as second:
            await until(lambda: listeners(store.url) == 2)
            store.flow(started_at=MOMENT + timedelta(seconds=1))
            await until(lambda: first.position == 2)
            assert second.position == 0


async def test_a_disk_that_cannot_be_written_is_waited_for(
    store: Store, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.parent.mkdir(parents=True)
    root.touch()  # a file where the folder should be
    store.flow()
    async with writing(store, root) as writer:
        await until(lambda: "JSON logs in" in caplog.text)
        root.unlink()
        await until(lambda: writer.position == 1)
    assert len(files(root / "requests")) == 1
    assert caplog.text.count("JSON logs in") == 1


async def test_a_full_disk_leaves_no_half_file(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer of a full disk, in the middle of a file."""
    real, calls = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real(descriptor, data[:10])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    store.flow()
    monkeypatch.setattr("megido_ingest.jsonlogs.tree.os.write", full)
    await write_all(store, root)
    assert read(root, "requests/20260213/143052_123456_GET.json")["id"] == 1
    assert len(files(root)) == 2


async def test_recent_and_cleanup(store: Store, root: Path) -> None:
    store.flows([{"started_at": MOMENT + timedelta(days=day)} for day in range(3)])
    store.row(tables.websocket_messages, **a_message(ids.to_uuid(ids.new_id())))
    await write_all(store, root)
    assert [entry["timestamp"][:10] for entry in recent(root, "requests", 2)] == ["2026-02-15", "2026-02-14"]
    assert len(recent(root, "websockets")) == 1
    assert recent(root, "errors") == []
    assert cleanup(root, days=1) == 6
    assert recent(root, "requests") == []
    assert not list((root / "requests").iterdir())
    assert len(recent(root, "websockets")) == 1, "just written"


async def test_a_database_that_goes_away_is_waited_for(store: Store, root: Path) -> None:
    async with writing(store, root) as writer:
        store.flow()
        await until(lambda: writer.position == 1)
        with psycopg.connect(store.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        store.flow(started_at=MOMENT + timedelta(seconds=1))
        await until(lambda: writer.position == 2)
    assert len(files(root / "requests")) == 2


async def test_a_row_that_no_file_can_show_holds_up_nothing(
    store: Store, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    year = 366 * 86_400_000_000
    store.flow(started_at=MOMENT.replace(year=9999), response_time_us=year)  # ends in the year 10000
    store.flow()
    await write_all(store, root)
    assert "responses/20260213/143052_345678_200.json" in files(root)
    assert "has no JSON log" in caplog.text


async def test_a_damaged_value_holds_up_nothing(store: Store, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.flow(request_headers=b"\x01 no zstd")
    store.flow()
    await write_all(store, root)
    assert files(root / "responses") == ["20260213/143052_345678_200.json"]
    assert "cannot be decoded and has no JSON log" in caplog.text
