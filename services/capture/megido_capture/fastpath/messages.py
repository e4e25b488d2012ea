"""Heads of HTTP messages: look-ups of fields, and checks that prove nothing about the traffic."""

from mitmproxy import http


def replace() -> None:
    # An assertion of mitmproxy's own development: gone under `python -O` too.
    http.MessageData.__post_init__ = _unchecked  # type: ignore[method-assign]
    http.Headers.get_all = get_all  # type: ignore[method-assign]


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
