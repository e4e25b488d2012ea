"""From causes to the seven types."""

import errno
import os
import socket

import pytest

from megido_capture.recording.errors import (
    MAX_MESSAGE,
    Cause,
    cause_of_exception,
    failure,
    plain,
    trace_of,
    type_of_message,
)
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
        ("unexpected server response: b'timeout certificate [Errno -2]'", P),
        ("unexpected server response: b'HTTP/1.1 200 OK\\r\\nSet-Co'", R),
        ("HTTP/1 protocol error: illegal chunk header: bytearray(b'tls timeout')", P),
        ("Cannot parse HTTP response: Bad HTTP response line: b'certificate'", P),
        ("HTTP/2 connection closed: <ConnectionTerminated error_code:2, additional_data:b'timeout'>", R),
        ("stream reset by client (PROTOCOL_ERROR)", R),
        ("HTTP request has no host header, destination unknown.", P),
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


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "unexpected server response: b'HTTP/1.1 200 OK\\r\\nSet-Cookie: s'",
            "the server closed the connection within the head of its response: <30 bytes>",
        ),
        ("illegal chunk header: bytearray(b'a \\'secret\\'\\r\\n')", "illegal chunk header: <12 bytes>"),
        ('Bad HTTP request line: b"it\'s"', "Bad HTTP request line: <4 bytes>"),
        ("Unexpected event: Data(data=b'cut off he", "Unexpected event: Data(data=<bytes>"),
        ("b'one' and b'two!'", "<3 bytes> and <4 bytes>"),
        ("Cannot parse ClientHello: " + "16" * 40, "Cannot parse ClientHello: <40 bytes>"),
        ("stream reset by client (CANCEL)", "HTTP/2 stream reset (CANCEL)"),
        ("[Errno 111] Connect call failed ('127.0.0.1', 1)", "[Errno 111] Connect call failed ('127.0.0.1', 1)"),
    ],
)
def test_messages_quote_no_traffic(message: str, expected: str) -> None:
    assert plain(message) == expected


def test_a_stack_trace_quotes_no_traffic_and_keeps_its_end() -> None:
    try:
        raise AssertionError(f"Unexpected event: {bytes(100)!r}")
    except AssertionError as error:
        trace = trace_of(error, 100)
    assert len(trace) == 100 and trace.endswith("AssertionError: Unexpected event: <100 bytes>")


def test_the_types_are_all_reachable_but_auth_which_is_an_event_of_its_own() -> None:
    assert {R, T, P, S, D, O} | {A} == set(ErrorType)
