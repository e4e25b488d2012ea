"""Captured text cannot drive a terminal."""

import pytest

from megido.terminal import safe, safe_line, table


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\x00b\x07c\x7fd\x9be", "a\\x00b\\x07c\\x7fd\\x9be"),
        ("abc\u202egpj.exe", "abc\\u202egpj.exe"),
        ("one\r\ntwo\tthree", "one\ntwo\tthree"),
        ("lone\rreturn", "lone\\rreturn"),
        ("Ünïcode ✓", "Ünïcode ✓"),
    ],
)
def test_control_characters_are_escaped(given: str, shown: str) -> None:
    assert safe(given) == shown


def test_a_line_stays_a_line() -> None:
    assert safe_line("a\nb\tc") == "a\\nb\\tc"


def test_columns_are_aligned_and_whole_in_a_pipe() -> None:
    long = "x" * 500
    assert table(("ID", "URL"), [["1", "short"], ["20", long]], right=frozenset({0})).splitlines() == [
        "ID  URL",
        " 1  short",
        f"20  {long}",
    ]
