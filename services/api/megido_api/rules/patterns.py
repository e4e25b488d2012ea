"""Checking a rule before it can reach a proxy. Pure."""

import re2

from megido_api.problems import bad_field
from megido_shared.rulelimits import MAX_MEM, compile_pattern, unusable_name


def check_pattern(field: str, pattern: str) -> None:
    """Raises Problem (400) when RE2, which proxies match with, cannot compile it: with the position, or because it
    would take more than MAX_MEM."""
    try:
        compile_pattern(pattern)
    except re2.error as error:
        reason = _reason(error)
        if "too large" in reason:
            raise bad_field(field, f"takes more than {MAX_MEM >> 10} KB compiled; RE2 says: {reason}") from error
        what, _, fragment = reason.partition(": ")
        position = len(pattern) if what == "missing )" else max(pattern.find(fragment), 0)
        raise bad_field(
            field, f"{reason} (RE2 has no look-around and no back-references)", position=position
        ) from error


def _reason(error: Exception) -> str:
    found = error.args[0] if error.args else ""
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)


def check_injection(injection_type: str, injection_point: str, payload: str) -> None:
    """Raises Problem (400) on a header or cookie that would not be one, would be two, or would change how a request
    is framed or whose it is."""
    if not injection_point:
        raise bad_field("injection_point", "must not be empty")
    if why := unusable_name(injection_type, injection_point):
        raise bad_field("injection_point", why)
    if injection_type in ("header", "cookie") and any(character in payload for character in "\r\n"):
        raise bad_field("payload_content", f"a {injection_type} must not contain a line break")
