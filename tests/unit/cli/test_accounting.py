"""What `megido accounting` prints, and says by its exit code."""

import json
from typing import Any, cast

import pytest

from megido.accounting import accounting
from megido.client import Client

SUMS: dict[str, Any] = {
    "captured": 12,
    "stored": 12,
    "waiting": 0,
    "since_heartbeat": 0,
    "dead_lettered": 0,
    "dropped": {},
    "expired": 0,
    "corrupt": 0,
    "unexplained": 0,
    "lost": 0,
    "balanced": True,
    "exact": True,
}


def answer(**sums: Any) -> dict[str, Any]:
    shown = SUMS | sums
    node = {"node": "capture-0", "heartbeat_age": 3.2, **shown}
    top = {"balanced": shown["unexplained"] == 0, "exact": shown["exact"]}
    return {**top, "total": shown, "nodes": [node], "posted": {"waiting": 0}, "bus": ""}


def printed(
    capsys: pytest.CaptureFixture[str], found: dict[str, Any], *, as_json: bool = False
) -> tuple[int, str, str]:
    class Answers:
        def accounting(self) -> dict[str, Any]:
            return found

    code = accounting(cast(Client, Answers()), as_json=as_json)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_line_a_node_and_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, answer())
    heading, node, total = [line.split() for line in out.splitlines()]
    assert heading[:5] == ["NODE", "CAPTURED", "STORED", "WAITING", "DEAD-LETTERED"]
    assert node == ["capture-0", "12", "12", "0", "0", "0", "0", "0", "0", "3", "s", "ago"]
    assert total == ["total", *node[1:9]]
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("sums", "code", "says"),
    [
        ({"dropped": {"cap": 2, "\x1b[0m": 1}, "lost": 3}, 1, "dropped because of: cap 2, \\x1b[0m 1"),
        ({"corrupt": 1, "lost": 1}, 1, ""),
        ({"unexplained": 1, "lost": 1}, 1, "1 records were captured and are nowhere: lost"),
        ({"unexplained": -2}, 1, "2 records were counted twice"),
        ({"dead_lettered": 1}, 0, "dead letters are kept"),
        ({"waiting": 3, "since_heartbeat": 1, "exact": False}, 0, "final once all is drained"),
    ],
)
def test_the_exit_code_says_whether_something_is_lost(
    sums: dict[str, Any], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code, out, err = printed(capsys, answer(**sums))
    assert exit_code == code and says in err and "\x1b" not in out + err
    assert ("not exact yet" in out) == (not sums.get("exact", True))
    as_json = printed(capsys, answer(**sums), as_json=True)
    assert as_json[0] == code and json.loads(as_json[1]) == answer(**sums)


def test_what_is_not_known_yet_counts_as_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, answer(waiting=3, since_heartbeat=1))[1].splitlines()[1].split()[3] == "4"


def test_without_nodes_there_is_nothing_to_prove(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, answer() | {"nodes": []})
    assert (code, out) == (0, "") and "no node was ever heard of" in err
