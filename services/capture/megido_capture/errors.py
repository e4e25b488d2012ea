"""From what went wrong to the seven error types of the founding document.

mitmproxy reports most causes as text. Connection hooks, which run closest to the cause, note a `Cause`; the hook
that ends a flow asks `classify` with that note, or with mitmproxy's message alone.
"""

import errno
import re
import socket
import traceback
from dataclasses import dataclass

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


# The first pattern found decides, so the specific ones stand before the general ones.
_PATTERNS: tuple[tuple[re.Pattern[str], ErrorType], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), error_type)
    for pattern, error_type in (
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
        (
            r"protocol error|cannot parse|unexpected server response|refusing to prevent request smuggling"
            r"|invalid request scheme|no host header|invalid http|malformed|bad http",
            ErrorType.PROTOCOL_ERROR,
        ),
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
    trace = "".join(traceback.format_exception(error))
    return Cause(type_of_exception(error), message or str(error), trace[-MAX_TRACE:])


def cause_of_message(message: str) -> Cause:
    return Cause(type_of_message(message), message)


def failure(message: str, cause: Cause | None = None) -> Failure:
    """The failure of an event. A noted cause wins over mitmproxy's text, whose details it lacks."""
    if cause is None:
        return Failure(type_of_message(message), message[:MAX_MESSAGE])
    return Failure(cause.error_type, (cause.message or message)[:MAX_MESSAGE], cause.stack_trace)
