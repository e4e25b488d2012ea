"""Checking a rule before it can reach a proxy. Pure."""

import re

import re2

from megido_api.problems import bad_field

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def check_pattern(field: str, pattern: str) -> None:
    """Raises Problem (400) with the position when RE2, which proxies match with, cannot compile it."""
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(pattern, options)
    except re2.error as error:
        reason = _reason(error)
        what, _, fragment = reason.partition(": ")
        position = len(pattern) if what == "missing )" else max(pattern.find(fragment), 0)
        raise bad_field(
            field, f"{reason} (RE2 has no look-around and no back-references)", position=position
        ) from error


def _reason(error: Exception) -> str:
    found = error.args[0] if error.args else ""
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)


def check_injection(injection_type: str, injection_point: str, payload: str) -> None:
    """Raises Problem (400) on a header or cookie that would not be one, or would be two."""
    if not injection_point:
        raise bad_field("injection_point", "must not be empty")
    if injection_type not in ("header", "cookie"):
        return
    if not _TOKEN.fullmatch(injection_point):
        raise bad_field("injection_point", f"is no name of a {injection_type}")
    if any(character in payload for character in "\r\n"):
        raise bad_field("payload_content", f"a {injection_type} must not contain a line break")
