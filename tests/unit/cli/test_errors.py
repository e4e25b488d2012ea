"""What `megido errors` prints."""

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest

from megido.client import Client
from megido.errors import MAX_MESSAGE, list_errors
from megido_shared.errors import ConfigurationError

HOSTILE = "\x1b]0;owned\x07\n\u202e"
ERROR: dict[str, Any] = {
    "id": 7,
    "error_type": "SSL_ERROR",
    "error_message": "no trust",
    "url": "https://a.example/",
    "source_ip": "10.0.0.1",
    "timestamp": "2026-02-13T14:30:52.123456+00:00",
    "request_id": None,
    "stack_trace": "",
}


class Answers:
    def __init__(self, *errors: dict[str, Any]) -> None:
        self._errors = errors
        self.asked: dict[str, str] = {}

    def each_error(self, **filters: str) -> Iterator[dict[str, Any]]:
        self.asked = filters
        yield from self._errors


def listed(answers: Answers, *, limit: int = 5, error_type: str = "", as_json: bool = False) -> int:
    return list_errors(cast(Client, answers), limit=limit, error_type=error_type, source_ip="", as_json=as_json)


def test_a_table_of_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    answers = Answers(ERROR, ERROR | {"id": 6, "request_id": 12, "url": "", "source_ip": ""}, ERROR | {"id": 5})
    assert listed(answers, limit=2, error_type="ssl_error") == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "TIME", "TYPE", "REQUEST", "SOURCE", "URL", "MESSAGE"]
    assert first.split()[3:] == ["SSL_ERROR", "-", "10.0.0.1", "https://a.example/", "no", "trust"]
    assert second.split()[3:] == ["SSL_ERROR", "12", "-", "-", "no", "trust"]
    assert answers.asked["error_type"] == "SSL_ERROR"


def test_messages_are_cut_and_drive_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    listed(Answers(ERROR | {"error_message": HOSTILE + "x" * 1000, "url": HOSTILE}))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "x…" in shown and len(shown) < MAX_MESSAGE + 300


def test_json_has_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = ERROR | {"error_message": "x" * 1000, "stack_trace": "Traceback"}
    listed(Answers(error), as_json=True)
    assert json.loads(capsys.readouterr().out) == error


def test_nothing_found_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(Answers()) == 0
    assert capsys.readouterr().err == "megido: no error matches\n"


def test_an_unknown_type_is_one_line() -> None:
    with pytest.raises(ConfigurationError, match="must be one of CONNECTION_RESET, TIMEOUT"):
        listed(Answers(), error_type="SLOW")
