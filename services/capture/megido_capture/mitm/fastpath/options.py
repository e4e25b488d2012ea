"""Reads of options, of which mitmproxy's layers make several for each request."""

from typing import Any

from mitmproxy import options

_PLAIN = (bool, int, str, type(None))


class Options(options.Options):
    """Reads of plain options without a deep copy and a walk. Values that can be changed in place (lists) are copied
    as before."""

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
