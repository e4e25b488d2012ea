"""What the history commands print, from answers as the API gives them."""

import time
from typing import Any, cast

import pytest

from megido.client import ApiError, Client
from megido.history import list_requests, replay, replay_range, show
from megido_shared.errors import MegidoError

HOSTILE = "\x1b]0;owned\x07\n\u202e"
LISTED: dict[str, Any] = {
    "id": 1,
    "method": "GET",
    "url": "http://a/",
    "host": "a",
    "protocol": "HTTP",
    "source_ip": "10.0.0.1",
    "timestamp": "2026-02-13T14:30:52.123456+00:00",
    "request_size": 0,
    "is_replay": False,
    "status_code": None,
    "response_time": None,
}
MESSAGE: dict[str, Any] = {"headers": {"a": "b"}, "raw_headers": [["a", "b"]], "body": "", "body_encoding": "text"}
DETAIL = LISTED | MESSAGE | {"port": 80, "user_agent": "x", "original_request_id": None, "error": None}
RESPONSE = MESSAGE | {"status_code": 200, "response_time": 1.5, "response_size": 2, "cached": False}


class Answers:
    """A client that knows its answers."""

    api_url = "http://localhost:8000"

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)

    def _next(self, *_: Any, **__: Any) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    request = replay = each_request = newest_id = _next


def client(*answers: Any) -> Client:
    return cast(Client, Answers(*answers))


@pytest.mark.parametrize("field", ["method", "url", "protocol", "source_ip", "user_agent"])
def test_no_field_of_a_request_drives_the_terminal(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    detail = DETAIL | {field: HOSTILE, "response": RESPONSE | {"error_message": HOSTILE, "headers": {"a": HOSTILE}}}
    assert show(client(detail), "1", as_json=False) == 0
    list_requests(
        client([detail]), limit=5, method="", url="", protocol="", source_ip="", search="", as_json=False
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"])
@pytest.mark.parametrize("zone", ["Etc/GMT+12", "Etc/GMT-14"])
def test_the_first_and_the_last_year_are_shown(
    moment: str, zone: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert show(client(DETAIL | {"timestamp": moment}), "1", as_json=False) == 0
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "Time      " in capsys.readouterr().out


def test_a_range_goes_on_past_what_cannot_be_sent(capsys: pytest.CaptureFixture[str]) -> None:
    sent = {"success": True, "request": LISTED, "response": RESPONSE, "error_message": None}
    answers = (
        4,  # the newest id when the run begins: what it stores itself is not sent again
        sent | {"replayed_request_id": None},
        ApiError(404, "not_found", "no request has the id 2"),
        ApiError(409, "not_stored_yet", "not stored yet; try again"),
        sent | {"replayed_request_id": None},
    )
    done = replay_range(client(*answers), 1, 6, target_url="", delay=0, verify_tls=True, as_json=False)
    shown = capsys.readouterr()
    assert done == 1
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == ["1", "4"]
    assert "3: not stored yet" in shown.err
    assert "2 replayed, 1 failed, 3 ids that no request has" in shown.err


def test_a_range_behind_the_newest_says_so() -> None:
    with pytest.raises(MegidoError, match="the newest is 4"):
        replay_range(client(4), 5, 9, target_url="", delay=0, verify_tls=True, as_json=False)


def test_a_body_that_was_cut_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cut = MESSAGE | {"body": "hel", "truncated": True}
    detail = DETAIL | cut | {"response": RESPONSE | {"error_message": None}}
    assert show(client(detail), "1", as_json=False) == 0
    assert capsys.readouterr().out.count("only this part is stored") == 1


def test_duplicate_headers_and_deviations_of_a_replay(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [["Set-Cookie", "a=1"], ["Set-Cookie", "b=2"]]
    answer = {
        "success": True,
        "request": LISTED | MESSAGE,
        "response": RESPONSE | {"raw_headers": pairs},
        "error_message": None,
        "replayed_request_id": None,
        "deviations": ["http-version: recorded as HTTP/2.0, sent as HTTP/1.1"],
    }
    done = replay(client(answer), "1", target_url="", verify_tls=True, verbose=True, as_json=False)
    shown = capsys.readouterr()
    assert done == 0
    assert ("Set-Cookie: a=1" in shown.out, "Set-Cookie: b=2" in shown.out) == (True, True)
    assert "sent as HTTP/1.1" in shown.err
