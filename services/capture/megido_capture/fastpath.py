"""Replacements of mitmproxy's hot spots, behaviour kept. Only our own master uses them, and `--no-fastpath` does not.

Few, and only what costs much and proves little: each names what it replaces and why it may be.
"""

import logging
from typing import Any

from mitmproxy import http, options, version
from mitmproxy.proxy import context

logger = logging.getLogger(__name__)

TESTED = ((12, 2), (12, 3))
"""Versions of mitmproxy that the replacements were tested with; on any other they are left out."""

_PLAIN = (bool, int, str, type(None))


class Options(options.Options):
    """Reads of plain options without a deep copy and a walk: mitmproxy makes one for each read, and its layers read
    several for each request. Values that can be changed in place (lists) are copied as before."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.changed.connect(self._keep)
        self._keep(set(self._options))

    def _keep(self, updated: set[str]) -> None:
        for name in updated:
            known = self._options.get(name)
            if known is None or hasattr(type(self), name):
                continue
            value = known.current()
            if isinstance(value, _PLAIN):
                self.__dict__[name] = value
            else:
                self.__dict__.pop(name, None)


def replace_hot_spots() -> bool:
    """Puts the replacements in place, for this process and for good. False on a version not tested against."""
    found = tuple(int(part) for part in version.VERSION.split(".")[:2])
    if found not in TESTED:
        logger.warning("running without the fast path: not tested with mitmproxy %s", version.VERSION)
        return False
    # An assertion of mitmproxy's own development: gone under `python -O` too.
    http.MessageData.__post_init__ = _unchecked  # type: ignore[method-assign]
    http.Headers.get_all = _get_all  # type: ignore[method-assign]
    context.Context.fork = _fork  # type: ignore[method-assign]
    return True


def _unchecked(self: http.MessageData) -> None:
    pass


def _get_all(self: http.Headers, name: str | bytes) -> list[str]:
    """`Headers.get_all`, which lowers every name for each look-up: names of another length cannot be meant."""
    wanted = (name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name).lower()
    length = len(wanted)
    return [
        value.decode("utf-8", "surrogateescape")
        for key, value in self.fields
        if len(key) == length and key.lower() == wanted
    ]


def _fork(self: context.Context) -> context.Context:
    """`Context.fork`, which makes a server with a UUID only to throw it away."""
    made = context.Context.__new__(context.Context)
    made.client = self.client
    made.options = self.options
    made.server = self.server
    made.layers = self.layers.copy()
    return made
