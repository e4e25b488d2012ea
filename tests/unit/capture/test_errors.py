"""From causes to the seven types."""

import errno
import os
import socket

import pytest

from megido_capture.errors import MAX_MESSAGE, Cause, cause_of_exception, failure, type_of_message
from megido_shared.events import ErrorType

R, T, A, P, S, D, O = (  # noqa: E741
    ErrorType.CONNECTION_RESET,
    ErrorType.TIMEOUT,
    ErrorType.AUTH_FAILURE,
    ErrorType.PROTOCOL_ERROR,
    ErrorType.SSL_ERROR,
    ErrorType.DNS_ERROR,
    ErrorType.OTHER,
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[Errno 111] Connect call failed ('127.0.0.1', 1)", R),
        ("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] Connect call failed", R),
        ("[Errno 104] Connection reset by peer", R),
        ("server closed connection", R),
        ("Client disconnected.", R),
        ("stream reset by client (CANCEL)", R),
        ("HTTP/1 protocol error: peer closed connection without sending complete message body", R),
        ("[Errno 110] Connect call failed", T),
        ("timed out: no connection within 2 seconds", T),
        ("timeout", T),
        ("Certificate verify failed: certificate has expired", S),
        ("The remote server does not speak TLS.", S),
        ("OpenSSL Error([('SSL routines', '', 'unexpected eof while reading')])", S),
        ("TLS handshake failed", S),
        ("[Errno -2] Name or service not known", D),
        ("[Errno -3] Temporary failure in name resolution", D),
        ("HTTP/2 protocol error: Invalid input", P),
        ("Cannot parse HTTP response: ...", P),
        ("unexpected server response: b'x'", P),
        ("Received header X from client, refusing to prevent request smuggling attacks.", P),
        ("[Errno 113] No route to host", O),
        ("", O),
        ("something else", O),
    ],
)
def test_messages(message: str, expected: ErrorType) -> None:
    assert type_of_message(message) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (socket.gaierror(socket.EAI_NONAME, "no such host"), D),
        (TimeoutError("slow"), T),
        (OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), T),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), R),
        (BrokenPipeError(errno.EPIPE, "pipe"), R),
        (OSError(errno.EHOSTUNREACH, "No route to host"), O),
    ],
)
def test_exceptions(error: OSError, expected: ErrorType) -> None:
    found = cause_of_exception(error)
    assert found.error_type is expected and type(error).__name__ in found.stack_trace


def test_a_noted_cause_wins_and_messages_are_cut() -> None:
    made = failure("connection closed", Cause(T, "timed out", "trace"))
    assert (made.error_type, made.message, made.stack_trace) == (T, "timed out", "trace")
    assert len(failure("x" * 10_000).message) == MAX_MESSAGE


def test_the_types_are_all_reachable_but_auth_which_is_an_event_of_its_own() -> None:
    assert {R, T, P, S, D, O} | {A} == set(ErrorType)
