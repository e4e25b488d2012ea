"""The replacements answer as what they replace."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mitmproxy import exceptions, http, options
from mitmproxy.coretypes import multidict
from mitmproxy.master import Master
from mitmproxy.proxy.context import Context
from mitmproxy.test import tflow, tutils

from megido_capture.counters import Counters, contained
from megido_capture.master import Dispatcher
from megido_capture.mitm import fastpath
from megido_capture.mitm.fastpath import layers, messages

FIELDS = (
    (b"Host", b"a"),
    (b"X-A", b"1"),
    (b"x-a", b"\xff\xc3\xa9"),
    (b"X-B", b""),
    (b"\xc3\xa4", b"umlaut"),
    (b"", b"nameless"),
)


@pytest.mark.parametrize("name", ["host", "HOST", b"host", "x-a", "x-b", "x-c", "ä", "Ä", "", b"X-A"])
def test_get_all(name: str | bytes) -> None:
    headers = http.Headers(FIELDS)
    encoded = name.encode() if isinstance(name, str) else name
    original = [value.decode("utf-8", "surrogateescape") for value in multidict.MultiDict.get_all(headers, encoded)]
    assert messages.get_all(headers, name) == original


def test_fork() -> None:
    flow = tflow.tflow()
    parent = Context(flow.client_conn, options.Options())
    parent.server = flow.server_conn
    parent.layers.append(object())  # type: ignore[arg-type]
    made = layers.fork(parent)
    assert vars(made) == vars(parent) and made.layers is not parent.layers and made.server is parent.server


def test_options_follow_every_change() -> None:
    plain, fast = options.Options(), fastpath.Options()
    for made in (plain, fast):
        made.add_option("later", str, "default", "help")
        made.update(ssl_insecure=True, mode=["regular", "socks5"], listen_port=1)
        made.set("later=set")
    assert {name: getattr(fast, name) for name in fast.keys()} == {name: getattr(plain, name) for name in plain.keys()}  # noqa: SIM118
    fast.mode.append("changed in place")
    assert fast.mode == ["regular", "socks5"]
    fast.listen_port = None
    assert fast.listen_port is None
    fast.reset()
    assert fast.ssl_insecure is False and fast.later == "default"


def test_options_roll_back() -> None:
    fast = fastpath.Options()

    def refuse(updated: set[str]) -> None:
        if fast.ssl_insecure:
            raise exceptions.OptionsError("no")

    fast.changed.connect(refuse)
    with pytest.raises(exceptions.OptionsError):
        fast.update(ssl_insecure=True)
    assert fast.ssl_insecure is False


LINES = (
    b"GET http://example.com/a?b#c HTTP/1.1",
    b"GET HTTP://example.com/ HTTP/1.1",
    b"GET http://example.com HTTP/1.1",
    b"GET http://example.com:8080/ HTTP/1.0",
    b"GET http://example.com:0/ HTTP/1.1",
    b"GET http://example.com:65536/ HTTP/1.1",
    b"GET https://[::1]:1/ HTTP/1.1",
    b"GET http://a..b/ HTTP/1.1",
    b"GET http://a_b.c-d./ HTTP/1.1",
    b"GET http://-/ HTTP/1.1",
    b"GET http://xn--nxasmq6b/ HTTP/1.1",
    b"GET http://xn--/ HTTP/1.1",
    b"GET http://" + b"a" * 64 + b"/ HTTP/1.1",
    b"GET http://user@example.com/ HTTP/1.1",
    b"GET http://example.com/\xc3\xa4 HTTP/1.1",
    b"GET http://example.com/[ HTTP/1.1",
    b"GET  http://example.com/ HTTP/1.1",
    b"GET http://example.com/ HTTP/11",
    b"GET http://example.com/ HTTP/1.1\n",
    b"CONNECT http://example.com/ HTTP/1.1",
    b"CONNECT example.com:443 HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"GET /origin HTTP/1.1",
    b"GET ftp://example.com/ HTTP/1.1",
)


@pytest.mark.parametrize("line", LINES)
def test_request_lines(line: bytes) -> None:
    for _ in range(2):  # what is remembered answers the same
        assert _outcome(messages.read_request_line, line) == _outcome(messages._original_request_line, line)


HEADS: tuple[tuple[tuple[bytes, bytes], ...], ...] = (
    (),
    ((b"Content-Length", b"5"),),
    ((b"content-length", b"0"), (b"Connection", b"close")),
    ((b"Content-Length", b"05"),),
    ((b"Content-Length", b""),),
    ((b"Content-Length", b"5\n"),),
    ((b"Content-Length", b"+5"),),
    ((b"Content-Length", b"5"), (b"Content-Length", b"5")),
    ((b"Content-Length", b"5"), (b"Transfer-Encoding", b"chunked")),
    ((b"Transfer-Encoding", b"chunked"),),
    ((b"Transfer-Encoding", b"gzip"),),
    ((b"Transfer-Encoding", b"nonsense"),),
    ((b"Transfer-Encodin\xe7", b"chunked"),),
    ((b"content length", b"5"),),
    ((b"content-lengt ", b"5"),),
    ((b"Connection", b"keep-alive"), (b"X-Plain", b"1")),
    ((b"", b"1"),),
    ((b"Host\n", b"1"),),
)


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0"])
def test_framing(fields: tuple[tuple[bytes, bytes], ...], version: bytes) -> None:
    request, response = tutils.treq(http_version=version), tutils.tresp(http_version=version)
    request.headers = response.headers = http.Headers(fields)
    for method in (b"GET", b"head", b"CONNECT"):
        for status in (101, 200, 204, 304, 404):
            request.data.method, response.data.status_code = method, status
            for arguments in ((request,), (request, response)):
                ours, theirs = messages.body_size, messages._original_body_size
                assert _outcome(ours, *arguments) == _outcome(theirs, *arguments)
    for message in (request, response):
        for _ in range(2):
            ours, theirs = messages.validate_headers, messages._original_validate
            assert _outcome(ours, message) == _outcome(theirs, message)
    assert messages.connection_close(version, request.headers) == messages._original_connection_close(
        version, request.headers
    )


@pytest.mark.parametrize("name", ["host", b"x-a", "x-c", ""])
def test_get(name: str | bytes) -> None:
    headers = http.Headers(FIELDS)
    values = messages.get_all(headers, name)
    assert messages.get(headers, name, "default") == (", ".join(values) if values else "default")
    assert messages.contains(headers, name) is bool(values)


def _outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


class Hooks:
    """Addons of all kinds, and the order in which they were called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.counters = Counters()

    def plain(self, data: Any) -> None:
        self.called.append("plain")

    def fails(self, data: Any) -> None:
        self.called.append("fails")
        raise ValueError("no")

    async def waits(self, data: Any) -> None:
        await asyncio.sleep(0)
        self.called.append("waits")

    def returns_one_that_waits(self, data: Any) -> Any:
        return self.waits(data)

    @contained
    def contained(self, data: Any) -> None:
        self.called.append("contained")
        raise exceptions.AddonHalt  # even this one is only counted

    def halts(self, data: Any) -> None:
        raise exceptions.AddonHalt

    async def waits_and_halts(self, data: Any) -> None:
        await asyncio.sleep(0)
        raise exceptions.AddonHalt


@pytest.mark.parametrize(
    ("functions", "called", "waited"),
    [
        (["plain", "fails", "plain"], ["plain", "fails", "plain"], False),
        (["plain", "halts", "plain"], ["plain"], False),
        (["plain", "waits", "fails", "waits", "plain"], ["plain", "waits", "fails", "waits", "plain"], True),
        (["returns_one_that_waits", "halts", "plain"], ["waits"], True),
        (["waits_and_halts", "plain"], [], True),
        (["contained", "waits", "contained"], ["contained", "waits", "contained"], True),
        ([], [], False),
    ],
)
async def test_functions_of_a_hook(functions: list[str], called: list[str], waited: bool) -> None:
    hooks, dispatcher = Hooks(), Dispatcher(Master(options.Options(), event_loop=asyncio.get_running_loop()))
    dispatcher.chain = [SimpleNamespace(request=getattr(hooks, name)) for name in functions]
    pending = dispatcher.start("request", None)
    assert (pending is not None) is waited
    if pending is not None:
        await pending
    assert hooks.called == called and hooks.counters["hook_errors:contained"] == called.count("contained")


def test_a_hook_is_left_out_while_its_addon_has_nothing_to_do_in_it() -> None:
    hooks = Hooks()
    dispatcher = Dispatcher(Master(options.Options(), event_loop=asyncio.new_event_loop()))
    idle = SimpleNamespace(request=hooks.plain, response=hooks.plain, idle_hooks=frozenset(("request",)))
    dispatcher.chain = [idle]
    dispatcher.start("request", None)
    assert hooks.called == []
    dispatcher.start("response", None)
    assert hooks.called == ["plain"]
    idle.idle_hooks = frozenset()
    dispatcher.forget()
    dispatcher.start("request", None)
    assert hooks.called == ["plain", "plain"]
