"""From what went wrong to the seven error types of the founding document.

mitmproxy reports most causes as text. Connection hooks, which run closest to the cause, note a `Cause`; the hook
that ends a flow asks `classify` with that note, or with mitmproxy's message alone.
"""

import ast
import errno
import re
import socket
import traceback
from dataclasses import dataclass

from megido_capture.mitm.http1 import without_advice
from megido_shared.events import ErrorType, Failure

MAX_MESSAGE = 1_000
"""mitmproxy puts what the peer sent into some messages; a record is no place for a second copy of a body."""

MAX_TRACE = 8_000


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a connection attempt failed, noted where it happened."""

    error_type: ErrorType
    message: str
    stack_trace: str = ""


_CUT_HEAD = "unexpected server response: "
_REFUSED = re.compile(
    r"unknown ca|bad certificate|certificate unknown|not trust|disconnected during|^connection closed$"
)
_LITERAL = re.compile(r"""(?:bytearray\()?\bb('(?:[^'\\]|\\.)*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|$))\)?""", re.DOTALL)
_HEX = re.compile(r"\b[0-9a-f]{32,}\b")

# The first pattern found decides, so the specific ones stand before the general ones. Those of HTTP come first of
# all: what follows them may be a peer's words, which mean nothing.
_PATTERNS: tuple[tuple[re.Pattern[str], ErrorType], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), error_type)
    for pattern, error_type in (
        (rf"^{_CUT_HEAD}b['\"]HTTP/|^HTTP/1 protocol error: peer closed connection", ErrorType.CONNECTION_RESET),
        (
            rf"^{_CUT_HEAD}|^HTTP/[12] protocol error|^Invalid HTTP/2|^Received .*HTTP/2|^cannot parse HTTP"
            r"|^Received .* refusing to prevent request smuggling|^invalid request scheme|^bad http"
            r"|^HTTP request has no host header",
            ErrorType.PROTOCOL_ERROR,
        ),
        (
            r"^stream reset by|^HTTP/2 connection closed|^Upstream proxy \S+ refused HTTP CONNECT",
            ErrorType.CONNECTION_RESET,
        ),
        (
            r"\[Errno -\d+\]|getaddrinfo|name or service not known|name resolution|nodename nor servname",
            ErrorType.DNS_ERROR,
        ),
        (r"certificate|openssl|\bssl\b|\btls\b|handshake", ErrorType.SSL_ERROR),
        (rf"\[Errno {errno.ETIMEDOUT}\]|timed? ?out", ErrorType.TIMEOUT),
        (
            rf"\[Errno ({errno.ECONNREFUSED}|{errno.ECONNRESET}|{errno.EPIPE}|{errno.ECONNABORTED})\]"
            r"|connect call failed|peer closed connection|closed connection|client disconnected|stream reset"
            r"|connection closed|connection killed|connection reset|connection cancelled|^EOF$",
            ErrorType.CONNECTION_RESET,
        ),
        (r"protocol error|malformed", ErrorType.PROTOCOL_ERROR),
    )
)


def type_of_message(message: str) -> ErrorType:
    """The type that mitmproxy's (or OpenSSL's) text stands for; OTHER when it stands for none."""
    for pattern, error_type in _PATTERNS:
        if pattern.search(message):
            return error_type
    return ErrorType.OTHER


def type_of_exception(error: BaseException) -> ErrorType:
    """The type of an exception from opening a connection."""
    match error:
        case socket.gaierror():
            return ErrorType.DNS_ERROR
        case TimeoutError():
            return ErrorType.TIMEOUT
        case ConnectionError():
            return ErrorType.CONNECTION_RESET
        case _:
            return type_of_message(str(error))


def cause_of_exception(error: BaseException, message: str = "") -> Cause:
    """A cause with the exception's stack trace."""
    return Cause(type_of_exception(error), message or str(error), trace_of(error))


def cause_of_message(message: str) -> Cause:
    return Cause(type_of_message(message), message)


def plain(message: str) -> str:
    """mitmproxy's text without the bytes of the traffic that it quotes: how many they are stands for them. A message
    goes to places where a body does not: the JSON logs, lists, a terminal."""
    if message.startswith(_CUT_HEAD):
        message = message.replace(_CUT_HEAD, "the server closed the connection within the head of its response: ", 1)
    elif message.startswith("stream reset by client"):
        message = message.replace("stream reset by client", "HTTP/2 stream reset", 1)  # said of servers as well
    message = _LITERAL.sub(_size_of, without_advice(message))
    return _HEX.sub(lambda found: f"<{len(found[0]) // 2} bytes>", message)[:MAX_MESSAGE]


def remedy(error: str, host: str) -> str:
    """What to do about a TLS handshake that a client broke off; empty when its certificate is not the reason."""
    if not _REFUSED.search(error):
        return ""
    return (
        ". Either the client must trust Megido's certificate authority (http://mitm.it through the proxy), or it pins "
        f"the server's certificate: then add {host} to passthrough_hosts (POST /proxy/api/config/passthrough/ "
        f'{{"host": "{host}"}}, or at the start --passthrough-hosts {host})'
    )


def trace_of(error: BaseException, at_most: int = MAX_TRACE) -> str:
    """A stack trace whose last line quotes no traffic: lines of code hold none."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    head = "Traceback (most recent call last):\n"
    return f"{head}{frames}{type(error).__qualname__}: {plain(str(error))}"[-at_most:]


def failure(message: str, cause: Cause | None = None) -> Failure:
    """The failure of an event. A noted cause wins over mitmproxy's text, whose details it lacks."""
    if cause is None:
        return Failure(type_of_message(message), plain(message))
    return Failure(cause.error_type, plain(cause.message or message), cause.stack_trace)


def _size_of(literal: re.Match[str]) -> str:
    try:
        return f"<{len(ast.literal_eval('b' + literal[1]))} bytes>"
    except (ValueError, SyntaxError):
        return "<bytes>"  # cut short
