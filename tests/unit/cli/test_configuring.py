"""What `megido config`, `nodes` and `rules` send and print, with answers as the API gives them."""

import io
import json
from typing import Any, cast

import pytest

from megido.client import Client
from megido.configuring import change, history, nodes, rules, show, unset
from megido_shared.config_fields import FIELDS, SECRETS
from megido_shared.errors import ConfigurationError

HOSTILE = "\x1b]0;owned\x07\n\u202e"


def shown(**more: Any) -> dict[str, Any]:
    fields = {f"{name}_set" if name in SECRETS else name: field.default for name, field in FIELDS.items()}
    about = {"scope": "global", "version": 4, "own": [], "scopes": ["global"], "overridden": {}, "fields": FIELDS}
    return fields | {"auth_password_set": False, "auth_token_set": True} | about | more


NODE: dict[str, Any] = {
    "node": "capture-0",
    "service": "capture",
    "state": "running",
    "alive": True,
    "listen": "127.0.0.1:8080",
    "source_app": "browser",
    "config_version": 3,
    "config_expected": 4,
    "config_stale": True,
    "config_error": "",
    "captured": 12,
    "counters": {"dropped": 2},
    "seen_at": "2026-02-13T14:30:52.123456+00:00",
    "pinned": {"max_body_size": "5"},
}


class Answers:
    """A client that knows its answer and keeps what was asked of it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, ...]] = []

    def config(self, *asked: Any) -> Any:
        self.asked.append(asked)
        return self.answer

    change_config = config

    def config_history(self, **asked: Any) -> Any:
        self.asked.append((asked,))
        return self.answer

    def nodes(self, **asked: Any) -> Any:
        self.asked.append((asked,))
        return self.answer

    def rules(self) -> Any:
        return self.answer


def client(answer: Any) -> tuple[Client, Answers]:
    made = Answers(answer)
    return cast(Client, made), made


def test_show_says_where_a_field_is_set_and_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    overridden = {"max_body_size": [{"node": "capture-0", "value": "5"}]}
    found, _ = client(shown(own=["cache_enabled"], cache_enabled=True, overridden=overridden))
    assert show(found, "global", as_json=False) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["cache_enabled"] == ["true", "global"]
    assert rows["max_body_size"] == ["1048576", "capture-0=5"]
    assert (rows["auth_token"], rows["auth_password"]) == (["(set)"], ["(none)"])
    assert set(FIELDS) <= rows.keys()


def test_values_are_sent_as_what_the_field_is(capsys: pytest.CaptureFixture[str]) -> None:
    found, made = client(shown(overridden={"max_body_size": [{"node": HOSTILE, "value": "5"}]}))
    sent = ["cache_enabled=ON", "logging_enabled=0", "max_body_size=7", "ip_blacklist=10.0.0.0/8, ::1", "auth_token="]
    assert change(found, "app:scanner", sent, as_json=False) == 0
    [(scope, fields)] = made.asked
    assert scope == "app:scanner"
    assert fields == {
        "cache_enabled": True,
        "logging_enabled": False,
        "max_body_size": 7,
        "ip_blacklist": "10.0.0.0/8, ::1",
        "auth_token": "",
    }
    printed = capsys.readouterr()
    assert "decided at the start of \\x1b]0;owned" in printed.err and "\x1b" not in printed.err


def test_a_secret_is_read_and_not_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:

    monkeypatch.setattr("sys.stdin", io.StringIO("p4ss word\n"))
    found, made = client(shown(auth_password_set=True))
    change(found, "global", ["auth_password"], as_json=False)
    assert made.asked == [("global", {"auth_password": "p4ss word"})]
    assert capsys.readouterr().out == "auth_password = (set)\n"


def test_unset_sends_null() -> None:
    found, made = client(shown())
    unset(found, "global", ["max_body_size", "auth_token"], as_json=False)
    assert made.asked == [("global", {"max_body_size": None, "auth_token": None})]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense=1", "no field"),
        ("cache_enabled=perhaps", "on or off"),
        ("max_body_size=many", "whole number"),
        ("max_body_size", "unset max_body_size"),
        (HOSTILE, r"\\x1b"),
    ],
)
def test_what_is_no_assignment_is_one_line(text: str, says: str) -> None:
    found, made = client(shown())
    with pytest.raises(ConfigurationError, match=says) as caught:
        change(found, "global", [text], as_json=False)
    assert "\n" not in str(caught.value) and made.asked == []


def test_nodes_say_what_they_apply_and_what_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    silent = NODE | {"node": "two", "alive": False, "config_error": HOSTILE}
    replayer = NODE | {"node": "replayer-0", "service": "replayer", "config_expected": None, "pinned": {}}
    found, made = client({"nodes": [NODE, silent, replayer]})
    assert nodes(found, every=False, as_json=False) == 0
    assert made.asked == [({"alive": True},)]
    printed = capsys.readouterr()
    one, two, three = printed.out.splitlines()[1:]
    assert "3 of 4 stale" in one and "max_body_size=5" in one and " running " in one
    assert " silent " in two and "–" in three
    assert printed.err.startswith("megido: two: \\x1b")
    nodes(found, every=True, as_json=True)
    assert made.asked[1] == ({"alive": None},)
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == NODE


def test_history_shows_settings_and_rules(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {
        "auth_password": {"old": None, "new": "changed"},
        "payload_rules.3": {"old": None, "new": {"name": HOSTILE}},
    }
    entry = {"version": 4, "changed_at": NODE["seen_at"], "changed_by": "127.0.0.1", "scope": "global"}
    found, _ = client({"changes": [entry | {"changes": changes}]})
    history(found, "", limit=5, as_json=False)
    printed = capsys.readouterr().out
    assert "auth_password: – → changed, payload_rules.3: – → \\x1b]0;owned" in printed and "\x1b" not in printed


def test_rules_show_their_hits(capsys: pytest.CaptureFixture[str]) -> None:
    rule = {
        "id": 1, "active": True, "hits": 10, "errors": 2, "skipped": 3, "injection_type": "header",
        "injection_point": "X", "target_apps": [], "name": HOSTILE, "target_url_pattern": "a|b",
    }  # fmt: skip
    found, _ = client([rule])
    rules(found, as_json=False)
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split()[:5] == ["1", "on", "10", "2", "3"] and "\x1b" not in row
