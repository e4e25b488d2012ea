"""What a payload rule may be: asked by the API before one is kept, and by every node before it is applied, which may
have it from an older API, from a bus or from a file."""

import re
from collections.abc import Callable
from typing import NamedTuple

import re2

MAX_ACTIVE = 1000
"""Active rules in force at one time."""

MAX_MEM = 256 << 10
"""RE2's budget in bytes for one pattern. It bounds what a pattern costs: a millisecond or two to compile, during which
the interpreter does nothing else, and this much memory."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING = frozenset(("content-length", "transfer-encoding", "te", "trailer", "connection", "upgrade", "keep-alive"))


MAX_STEPS = 2_000_000
"""Instructions of a pattern times characters of a text. RE2's time is linear in both, at worst 50 ns for each: where
its automaton does not fit into its budget, `(a?){300}b` takes three seconds for 60,000 letters a."""

SEARCHED_ALWAYS = 2048
"""Characters of a text that every pattern is searched in."""


class Pattern(NamedTuple):
    """`search` gives None when it is not found; `longest` is the length of the texts that it may be asked about."""

    search: Callable[[str], object]
    longest: int


def compile_pattern(pattern: str) -> Pattern:
    """Raises re2.error when `pattern` is none, or takes more than MAX_MEM."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_MEM
    compiled = re2.compile(pattern, options)
    re2.purge()  # it keeps the last 128 for ever
    return Pattern(compiled.search, max(SEARCHED_ALWAYS, MAX_STEPS // max(1, compiled.programsize)))


def unusable_name(injection_type: str, name: str) -> str:
    """Why no rule may set a header or cookie of that name; "" when one may. Names of parameters and body fields are
    anything."""
    if injection_type not in ("header", "cookie"):
        return ""
    if not _TOKEN.fullmatch(name):  # RFC 9110, 5.6.2; pseudo headers of HTTP/2 are none either
        return f"is no name of a {injection_type}"
    lower = name.lower()
    if injection_type == "header" and lower in _FRAMING:
        return "decides where a message ends or belongs to its connection: the proxy sets it"
    if injection_type == "header" and lower.startswith("proxy-"):
        return "is between a client and this proxy, and not sent on"
    return ""
