"""Heads of HTTP messages: look-ups of fields, and checks of what is plainly right. Whatever looks unusual goes to
mitmproxy's own function, which decides."""

import re
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import uuid_utils
from mitmproxy import flow, http
from mitmproxy.net.http import http1, url, validate
from mitmproxy.net.http.http1 import read
from mitmproxy.proxy.layers import http as layers

_original_body_size = read.expected_http_body_size
_original_connection_close = read.connection_close
_original_request_line = read._read_request_line
_original_validate = validate.validate_headers

_ABSOLUTE = re.compile(rb"([!-~]+) (https?)://([A-Za-z0-9.\-]+(?::[0-9]+)?)(/[!-~]*) (HTTP/[0-9]\.[0-9])")
"""A request line to a proxy as almost all are."""

_names: dict[bytes, bool] = {}
"""Names of fields that are valid, and whether they say nothing about the body's length. Bounded."""
_NAMES_AT_MOST = 4096


def replace() -> None:
    # An assertion of mitmproxy's own development: gone under `python -O` too.
    http.MessageData.__post_init__ = _unchecked  # type: ignore[method-assign]
    http.Headers.get_all = get_all  # type: ignore[method-assign]
    http.Headers.get = get  # type: ignore[method-assign,assignment]
    http.Headers.__contains__ = contains  # type: ignore[method-assign,assignment]
    read._read_request_line = read_request_line
    http1.expected_http_body_size = layers.expected_http_body_size = body_size  # type: ignore[attr-defined]
    http1.connection_close = connection_close
    layers.validate_headers = validate_headers  # type: ignore[attr-defined]
    # The ids of flows: random UUIDs, from the same source in the system, in a tenth of the time.
    setattr(flow, "uuid", SimpleNamespace(uuid4=uuid_utils.uuid4))  # noqa: B010 - a module to mypy


def _unchecked(self: http.MessageData) -> None:
    pass


def get_all(self: http.Headers, name: str | bytes) -> list[str]:
    """`Headers.get_all`, which lowers every name for each look-up: names of another length cannot be meant."""
    wanted = (name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name).lower()
    length = len(wanted)
    return [
        value.decode("utf-8", "surrogateescape")
        for key, value in self.fields
        if len(key) == length and key.lower() == wanted
    ]


def get(self: http.Headers, key: str | bytes, default: Any = None) -> Any:
    """`Headers.get`, without an exception for what is not there."""
    values = get_all(self, key)
    return ", ".join(values) if values else default


def contains(self: http.Headers, key: object) -> bool:
    """`name in headers`, likewise. `key` is str or bytes."""
    wanted = (key.encode("utf-8", "surrogateescape") if isinstance(key, str) else cast("bytes", key)).lower()
    length = len(wanted)
    for name, _ in self.fields:  # noqa: SIM110 - a generator costs more than the loop
        if len(name) == length and name.lower() == wanted:
            return True
    return False


@lru_cache(maxsize=1024)
def _authority(authority: bytes) -> tuple[str, int | None]:
    return url.parse_authority(authority, check=True)


def read_request_line(line: bytes) -> tuple[str, int, bytes, bytes, bytes, bytes, bytes]:
    """`_read_request_line`, which parses the target a second time, as a whole, and throws the result away ("TODO: we
    can probably get rid of this check?"): it proves nothing more about one that has this form."""
    found = _ABSOLUTE.fullmatch(line)
    if found is None or found[1] == b"CONNECT" or b"xn--" in line:
        return _original_request_line(line)
    method, scheme, authority, path, version = found.groups()
    try:
        host, port = _authority(authority)
    except ValueError:
        return _original_request_line(line)
    return host, port or (443 if scheme == b"https" else 80), method, scheme, authority, path, version


def body_size(request: http.Request, response: http.Response | None = None) -> int | None:
    """`expected_http_body_size`, which is asked five times for each exchange."""
    if response is not None:
        status, method = response.data.status_code, request.data.method.upper()
        if method == b"HEAD" or 100 <= status <= 199 or status in (204, 304):
            return 0
        if method == b"CONNECT" and 200 <= status <= 299:
            return 0
    length: bytes | None = None
    for name, value in (request if response is None else response).data.headers.fields:
        size = len(name)
        if size == 14 and name.lower() == b"content-length":
            if length is not None or not _is_number(value):
                return _original_body_size(request, response)
            length = value
        elif size == 17 and name.lower() == b"transfer-encoding":
            return _original_body_size(request, response)
    if length is not None:
        return int(length)
    return 0 if response is None else -1


def connection_close(version: str | bytes, headers: http.Headers) -> bool:
    for name, _ in headers.fields:
        if len(name) == 10 and name.lower() == b"connection":
            return bool(_original_connection_close(version, headers))  # type: ignore[no-untyped-call]
    return version not in ("HTTP/1.1", b"HTTP/1.1", "HTTP/2.0", b"HTTP/2.0")


def validate_headers(message: http.Message) -> None:
    """`validate_headers`. Raises ValueError on what could smuggle a request past another reader."""
    has_length = False
    for name, value in message.headers.fields:
        if name in _names:
            if _names[name]:
                continue
        elif _is_plain(name):
            continue
        if has_length or name.lower() != b"content-length" or not _is_number(value):
            return _original_validate(message)  # a name it may refuse, Transfer-Encoding, or a second length
        has_length = True
    return None


def _is_plain(name: bytes) -> bool:
    """Whether a name is valid and says nothing about the body's length."""
    if not validate._valid_header_name.match(name) or name.endswith(b"\n"):
        return False
    plain = name.lower() not in (b"transfer-encoding", b"content-length")
    if len(_names) < _NAMES_AT_MOST:
        _names[name] = plain
    return plain


def _is_number(value: bytes) -> bool:
    return value.isdigit() and (len(value) == 1 or value[0] != 48)
