"""The table of errors: each cause, what the client gets, and how it is recorded.

`test_error_table.py` makes every row happen. docs/errors.md shows the rows as `python -m
tests.integration.capture.error_rows` prints them.
"""

import sys
from dataclasses import dataclass

from megido_shared.events import AuthAttempted, ErrorRaised, ErrorType, FlowFailed
from tests.integration.capture.breakage import (
    SEEN,
    Client,
    Over,
    Server,
    bad_request,
    black_hole,
    certified,
    curling,
    distrusting,
    expired,
    h2_bad_frame,
    h2_cancels_stream,
    h2_client_bad_frame,
    h2_client_goes_away,
    h2_client_resets,
    h2_goes_away,
    h2_resets_connection,
    h2_resets_connection_in_body,
    h2_resets_stream,
    h2_resets_stream_in_body,
    h2_says,
    h2_sending,
    h2_waits_in_body,
    h2_within_head,
    hello,
    in_tunnel,
    never,
    nobody,
    refusing_proxy,
    says,
    self_signed,
    sending,
    speaks,
    speaks_plainly,
    unknown_authority,
    unknown_name,
    wrong_host,
)

RESET, TIMEOUT, AUTH = ErrorType.CONNECTION_RESET, ErrorType.TIMEOUT, ErrorType.AUTH_FAILURE
PROTOCOL, SSL, DNS = ErrorType.PROTOCOL_ERROR, ErrorType.SSL_ERROR, ErrorType.DNS_ERROR

type Gets = dict[str, str]
"""What the client gets, by what it goes over: `http`, `https` (HTTP/1.1 in a tunnel) or `h2` (HTTP/2 in one). A status,
with `to CONNECT` when no tunnel was opened and with `cut` when the answer broke off; `closed` without an answer; `gone`
when it was the client that left."""

UNREACHED: Gets = {"http": "502", "https": "502 to CONNECT"}
NO_TLS: Gets = {"https": "502", "h2": "502"}
BAD_ANSWER: Gets = {"http": "502", "https": "502"}
CUT: Gets = {"http": "200, cut", "https": "200, cut"}
LEFT: Gets = {"http": "gone", "https": "gone"}
BAD_REQUEST: Gets = {"http": "400", "https": "400"}

OK = b"HTTP/1.1 200 OK\r\n"
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
PART_OF_HEAD = b"GET %s HTTP/1.1\r\nCookie: secret"
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\n"
SMALL, LARGE, CHUNKED = (
    b"Content-Length: 1000\r\n\r\n",
    b"Content-Length: 1000000\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n",
)
CHUNK = b"64\r\n" + SEEN + b"\r\n"
BOTH = b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
TWO = b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"
NONSENSE = b"Content-Length: many\r\n\r\nabcd"
THROUGH_SERVER = ("--mode", "upstream:http://127.0.0.1:{port}")
quiet = speaks(never)
curl = curling()
fine = speaks(says(OK + b"Content-Length: 2\r\n\r\nok"))


@dataclass(frozen=True)
class Row:
    cause: str
    error: ErrorType
    gets: Gets
    server: Server = quiet
    client: Client = curl
    flow: bool = True
    """Recorded as a failed flow; else, and for every refused CONNECT, as an error without one."""
    request: int = 0
    """Bytes of the request body that the record has."""
    response: int = 0
    trace: bool = False
    says: str = ""
    """Part of the message."""
    options: tuple[str, ...] = ()
    """Flags of the proxy; `{port}` in them is the server's."""

    def recorded_as(self, over: str) -> type[FlowFailed | ErrorRaised | AuthAttempted]:
        if self.error is AUTH:
            return AuthAttempted
        return FlowFailed if self.flow and "CONNECT" not in self.gets[over] else ErrorRaised


ROWS = (
    # The server cannot be reached.
    Row("the server refuses the connection", RESET, UNREACHED, nobody, trace=True, says="Connect call failed"),
    Row("the server's name does not resolve", DNS, UNREACHED, unknown_name, trace=True),
    Row(
        "no connection within `connection_timeout`",
        TIMEOUT,
        UNREACHED,
        black_hole,
        says="no connection within 3 seconds",
    ),
    Row(
        "the proxy behind (mode upstream) asks for credentials",
        RESET,
        NO_TLS,
        refusing_proxy(b"407 Proxy Authentication Required"),
        says="407 Proxy Authentication Required",
        options=THROUGH_SERVER,
    ),
    Row(
        "the proxy behind (mode upstream) opens no tunnel",
        RESET,
        NO_TLS,
        refusing_proxy(b"403 No certificate for you"),
        says="403 No certificate",
        options=THROUGH_SERVER,
    ),
    # TLS with the server.
    Row(
        "the server's TLS handshake takes longer than `connection_timeout`",
        TIMEOUT,
        NO_TLS,
        speaks_plainly(never),
        says="no TLS handshake within 3 seconds",
    ),
    Row("the server speaks no TLS", SSL, NO_TLS, speaks_plainly(bad_request), says="does not speak TLS"),
    Row("the server's certificate has expired", SSL, NO_TLS, certified(expired), says="expired"),
    Row("the server's certificate is self-signed", SSL, NO_TLS, certified(self_signed), says="self-signed"),
    Row("the server's certificate is for another host", SSL, NO_TLS, certified(wrong_host), says="name mismatch"),
    Row(
        "the server's certificate is from an unknown authority",
        SSL,
        NO_TLS,
        certified(unknown_authority),
        says="unable to get local issuer",
    ),
    # The server goes.
    Row(
        "the server sends nothing for `transfer_timeout`", TIMEOUT, BAD_ANSWER | {"h2": "502"}, says="transfer_timeout"
    ),
    Row("the server closes without an answer", RESET, BAD_ANSWER, speaks(says())),
    Row(
        "the server resets the connection before its answer",
        RESET,
        BAD_ANSWER | {"h2": "502"},
        speaks(says(then="reset"), h2_says(h2_resets_connection)),
    ),
    Row(
        "the server resets the connection within the head of its answer",
        RESET,
        BAD_ANSWER,
        speaks(says(OK + b"Content-Le", then="reset")),
    ),
    Row(
        "the server resets the connection within a small body",
        RESET,
        BAD_ANSWER | {"h2": "502"},
        speaks(says(OK + SMALL + SEEN, then="reset"), h2_says(h2_resets_connection_in_body)),
        response=len(SEEN),
    ),
    Row(
        "the server closes the connection within a small body",
        RESET,
        BAD_ANSWER,
        speaks(says(OK + SMALL + SEEN)),
        response=len(SEEN),
    ),
    Row(
        "the server resets the connection within a large body",
        RESET,
        CUT,
        speaks(says(OK + LARGE + SEEN, then="reset")),
        response=len(SEEN),
    ),
    Row(
        "the server resets the connection within a chunked body",
        RESET,
        CUT,
        speaks(says(OK + CHUNKED + CHUNK, then="reset")),
        response=len(SEEN),
    ),
    Row(
        "the server resets the connection within a body without a length",
        RESET,
        {"http": "200", "https": "200"},
        speaks(says(OK + b"\r\n" + SEEN, then="reset")),
        response=len(SEEN),
    ),
    # HTTP/2 with the server.
    Row("the server resets the HTTP/2 stream", RESET, {"h2": "502"}, speaks(never, h2_says(h2_resets_stream))),
    Row("the server cancels the HTTP/2 stream", RESET, {"h2": "closed"}, speaks(never, h2_says(h2_cancels_stream))),
    Row(
        "the server resets the HTTP/2 stream within a body",
        RESET,
        {"h2": "502"},
        speaks(never, h2_says(h2_resets_stream_in_body)),
        response=len(SEEN),
    ),
    Row("the server sends GOAWAY", RESET, {"h2": "502"}, speaks(never, h2_says(h2_goes_away))),
    Row("the server sends a bad HTTP/2 frame", PROTOCOL, {"h2": "502"}, speaks(never, h2_says(h2_bad_frame))),
    # Bad HTTP/1 from the server.
    Row("the answer has no status line", PROTOCOL, BAD_ANSWER, speaks(says(b"this is no HTTP\r\n\r\n"))),
    Row("the answer has no line at all", PROTOCOL, BAD_ANSWER, speaks(says(b"timeout: bad certificate"))),
    Row("the answer has Content-Length and Transfer-Encoding", PROTOCOL, BAD_ANSWER, speaks(says(OK + BOTH))),
    Row("the answer has two lengths", PROTOCOL, BAD_ANSWER, speaks(says(OK + TWO))),
    Row("the answer's length is no number", PROTOCOL, BAD_ANSWER, speaks(says(OK + NONSENSE))),
    Row(
        "the answer has a bad chunk",
        PROTOCOL,
        CUT,
        speaks(says(OK + CHUNKED + CHUNK + b"a secret\r\n")),
        response=len(SEEN),
    ),
    # TLS with the client.
    Row(
        "the client does not trust Megido's certificate",
        SSL,
        {"https": "closed", "h2": "closed"},
        fine,
        distrusting,
        flow=False,
        says="does not trust",
    ),
    Row(
        "the client leaves within its hello", SSL, {"https": "closed"}, fine, in_tunnel(hello("localhost")[:60]), False
    ),
    Row("the client leaves after its hello", SSL, {"https": "closed"}, fine, in_tunnel(hello("localhost")), False),
    Row("the client's hello is none", SSL, {"https": "closed"}, fine, in_tunnel(b"\x16\x03\x01\x00\x05hello"), False),
    Row(
        "the client's hello takes longer than `header_timeout`",
        TIMEOUT,
        {"https": "closed"},
        fine,
        in_tunnel(hello("localhost")[:60], then="wait"),
        False,
        options=("--header-timeout", "1"),
    ),
    Row(
        "the rest of the client's handshake takes longer than `header_timeout`",
        TIMEOUT,
        {"https": "closed"},
        fine,
        in_tunnel(hello("localhost"), then="wait"),
        False,
        options=("--header-timeout", "1"),
    ),
    Row(
        "the request's head takes longer than `header_timeout`",
        TIMEOUT,
        {"http": "closed", "https": "closed", "h2": "closed"},
        fine,
        Over(h1=sending(PART_OF_HEAD), h2=h2_within_head("wait")),
        False,
        says="within 1 seconds (header_timeout)",
        options=("--header-timeout", "1"),
    ),
    # The client goes.
    Row(
        "the client closes within the head of its request",
        RESET,
        {"http": "gone", "https": "gone", "h2": "gone"},
        fine,
        Over(h1=sending(PART_OF_HEAD, then="close"), h2=h2_within_head("close")),
        False,
        says="within the head of its request",
    ),
    Row(
        "the client resets within the head of its request",
        RESET,
        {"http": "gone", "https": "gone", "h2": "gone"},
        fine,
        Over(h1=sending(PART_OF_HEAD, then="reset"), h2=h2_within_head("reset")),
        False,
        says="within the head of its request",
    ),
    Row("the client closes while it waits", RESET, LEFT, client=sending(GET, then="close")),
    Row("the client resets while it waits", RESET, LEFT, client=sending(GET, then="reset")),
    Row(
        "the client leaves within a small upload",
        RESET,
        LEFT,
        client=sending(POST + SMALL + SEEN, then="reset"),
        request=len(SEEN),
    ),
    Row(
        "the client leaves within a large upload",
        RESET,
        LEFT,
        client=sending(POST + LARGE + SEEN, then="reset"),
        request=len(SEEN),
    ),
    Row(
        "the client leaves within a chunked upload",
        RESET,
        LEFT,
        client=sending(POST + CHUNKED + CHUNK, then="reset"),
        request=len(SEEN),
    ),
    Row(
        "the client leaves within a large answer",
        RESET,
        LEFT,
        speaks(says(OK + LARGE + SEEN, then="wait")),
        sending(GET, until=SEEN, then="reset"),
        response=len(SEEN),
    ),
    Row(
        "the client leaves before a small answer is whole",
        RESET,
        {"http": "closed", "https": "closed", "h2": "closed"},
        speaks(says(OK + SMALL + SEEN, then="wait"), h2_says(h2_waits_in_body)),
        curling(most=0.5),
        response=len(SEEN),
    ),
    Row(
        "the client cancels the HTTP/2 stream",
        RESET,
        {"h2": "closed"},
        client=h2_sending(h2_client_resets),
        request=len(SEEN),
    ),
    Row("the client sends GOAWAY", RESET, {"h2": "closed"}, client=h2_sending(h2_client_goes_away), request=len(SEEN)),
    # Bad HTTP from the client.
    Row(
        "the request has no request line", PROTOCOL, BAD_REQUEST, client=sending(b"no HTTP at all\r\n\r\n"), flow=False
    ),
    Row(
        "the request has a broken field",
        PROTOCOL,
        BAD_REQUEST,
        client=sending(b"GET %s HTTP/1.1\r\nno colon\r\n\r\n"),
        flow=False,
    ),
    Row("the request names no host", PROTOCOL, {"http": "400"}, client=sending(b"GET / HTTP/1.1\r\n\r\n"), flow=False),
    Row("the request has Content-Length and Transfer-Encoding", PROTOCOL, BAD_REQUEST, client=sending(POST + BOTH)),
    Row("the request has two lengths", PROTOCOL, BAD_REQUEST, client=sending(POST + TWO)),
    Row("the request's length is no number", PROTOCOL, BAD_REQUEST, client=sending(POST + NONSENSE)),
    Row(
        "the request has a bad chunk",
        PROTOCOL,
        {"http": "closed", "https": "closed"},
        client=sending(POST + CHUNKED + CHUNK + b"a secret\r\n"),
        request=len(SEEN),
    ),
    Row(
        "the client sends a bad HTTP/2 frame within an upload",
        PROTOCOL,
        {"h2": "closed"},
        client=h2_sending(h2_client_bad_frame),
        request=len(SEEN),
    ),
    Row(
        "the client sends a bad HTTP/2 frame before any request",
        PROTOCOL,
        {"h2": "closed"},
        client=h2_sending(h2_client_bad_frame, request=False),
        flow=False,
    ),
    # Access.
    Row(
        "the client has no credentials, or wrong ones",
        AUTH,
        {"http": "407", "https": "407 to CONNECT"},
        fine,
        options=("--auth-required", "--auth-token", "right"),
    ),
)

NAMES = {"http": "HTTP", "https": "HTTPS", "h2": "HTTP/2"}


def table() -> str:
    """The rows as docs/errors.md shows them."""
    lines = ["| Cause | Type | Client gets | Recorded as |", "|---|---|---|---|"]
    for row in ROWS:
        gets = _grouped(row.gets)
        kinds = _grouped({over: _KINDS[row.recorded_as(over)] for over in row.gets})
        lines.append(f"| {row.cause} | {row.error.value} | {gets} | {kinds}{', stack trace' if row.trace else ''} |")
    return "\n".join(lines) + "\n"


_KINDS: dict[type, str] = {FlowFailed: "failed flow", ErrorRaised: "error without a flow", AuthAttempted: "auth event"}


def _grouped(by_over: dict[str, str]) -> str:
    values = dict.fromkeys(by_over.values())
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(
        f"{value} ({', '.join(NAMES[over] for over, found in by_over.items() if found == value)})" for value in values
    )


if __name__ == "__main__":
    sys.stdout.write(table())
