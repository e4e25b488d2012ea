"""What a payload rule may be: asked by the API before one is kept, and by every node before it is applied, which may
have it from an older API, from a bus or from a file."""

import re
from collections.abc import Callable

import re2

MAX_ACTIVE = 1000
"""Active rules in force at one time."""

MAX_MEM = 256 << 10
"""RE2's budget in bytes for one pattern. It bounds what a pattern costs: a millisecond or two to compile, during which
the interpreter does nothing else, and this much memory."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING = frozenset(("content-length", "transfer-encoding", "te", "trailer", "connection", "upgrade", "keep-alive"))


def compile_pattern(pattern: str) -> Callable[[str], object]:
    """`pattern` as a search in a text, which gives None when it is not found. Raises re2.error when it is none, or
    takes more than MAX_MEM."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_MEM
    search: Callable[[str], object] = re2.compile(pattern, options).search
    re2.purge()  # it keeps the last 128 for ever
    return search


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
