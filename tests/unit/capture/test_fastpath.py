"""The replacements answer as what they replace."""

import pytest
from mitmproxy import http, options
from mitmproxy.coretypes import multidict
from mitmproxy.proxy.context import Context
from mitmproxy.test import tflow

from megido_capture import fastpath
from megido_capture.fastpath import layers, messages

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
    from mitmproxy import exceptions

    fast = fastpath.Options()

    def refuse(updated: set[str]) -> None:
        if fast.ssl_insecure:
            raise exceptions.OptionsError("no")

    fast.changed.connect(refuse)
    with pytest.raises(exceptions.OptionsError):
        fast.update(ssl_insecure=True)
    assert fast.ssl_insecure is False
