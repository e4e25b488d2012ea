"""What captured traffic may do to a terminal: nothing. And tables that fit into one."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069]")
_LINE = re.compile(r"[\t\n]")


def safe(text: str) -> str:
    """Control and bidirectional override characters escaped; line ends and tabs stay (bodies)."""
    return _CONTROL.sub(_escape, text.replace("\r\n", "\n"))


def safe_line(text: str) -> str:
    return _LINE.sub(_escape, safe(text))


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


def write(text: str) -> None:
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"megido: {text}\n")


def listing[T](
    found: Sequence[T],
    headings: Sequence[str],
    row: Callable[[T], Sequence[str]],
    *,
    as_json: bool,
    empty: str,
    right: frozenset[int] = frozenset(),
) -> None:
    """One JSON object a line for pipes, a table for people; without any, `empty` for people on stderr."""
    if as_json:
        for one in found:
            write(json.dumps(one, ensure_ascii=False))
    elif found:
        write(table(headings, [row(one) for one in found], right=right))
    else:
        for line in empty.splitlines():
            note(line)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Aligned columns; the last one is cut to a terminal's width, and whole in a pipe. `right`-aligned columns by
    their index."""
    cells = [list(headings), *([safe_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(headings))]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    return "\n".join(_line(row, widths, right, room) for row in cells)


def _line(row: Sequence[str], widths: Sequence[int], right: frozenset[int], room: int) -> str:
    parts = [
        cell.rjust(width) if index in right else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    line = "  ".join(parts).rstrip()
    return line if not room or len(line) <= room else line[: room - 1] + "…"
