"""Entity tags in conditional requests (RFC 9110, section 8.8.3)."""

import re
from collections.abc import Iterable

_TAG = re.compile(r'[\t ,]*(W/)?("[\x21\x23-\x7e\x80-\xff]*")[\t ]*(?=,|$)')


def if_match(header: Iterable[str], tag: str) -> bool:
    """Whether `If-Match`, all its lines, allows a change of what now has that strong tag: by the strong comparison,
    in which a weak one is equal to none (section 13.1.1). What is no list of tags matches nothing."""
    return _found(header, tag, weak=False)


def if_none_match(header: Iterable[str], tag: str) -> bool:
    """Whether `If-None-Match` names that tag: by the weak comparison (section 13.1.2)."""
    return _found(header, tag, weak=True)


def _found(header: Iterable[str], tag: str, *, weak: bool) -> bool:
    text = ",".join(header).strip()
    if text == "*":
        return True
    at, found = 0, False
    while match := _TAG.match(text, at):
        at = match.end()
        found = found or (match[2] == tag and (weak or not match[1]))
    return found and not text[at:].strip("\t ,")
