"""A record as a person reads it. Pure."""

from typing import Any

import msgspec

_MOST_VALUES = 2_000
_MOST_DEPTH = 12
_MOST_BYTES = 2_000
_ELLIPSIS = "…"


def decoded(raw: bytes) -> Any:
    """JSON of a MessagePack record, bounded in values, depth and length; None when it is not MessagePack."""
    try:
        found = msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return _View().of(found, 0)


class _View:
    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def of(self, value: Any, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > _MOST_DEPTH:
            return _ELLIPSIS
        if isinstance(value, dict):
            return {_cut(str(name)): self.of(one, depth + 1) for name, one in self._some(value.items())}
        if isinstance(value, list | tuple):
            return [self.of(one, depth + 1) for one in self._some(value)]
        return _scalar(value)

    def _some(self, values: Any) -> list[Any]:
        return [one for one, _ in zip(values, range(self._left + 1), strict=False)]


def _scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        return _bytes(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else str(value)
    return _cut(str(value))


def _bytes(value: bytes) -> dict[str, str]:
    """Text where all of it is readable text, hexadecimal digits otherwise."""
    shown, rest = value[:_MOST_BYTES], _ELLIPSIS if len(value) > _MOST_BYTES else ""
    text = shown.decode(errors="ignore" if rest else "replace")
    if "\ufffd" not in text and all(c.isprintable() or c in "\r\n\t" for c in text):
        return {"text": text + rest}
    return {"hex": shown.hex() + rest}


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_BYTES else text[:_MOST_BYTES] + _ELLIPSIS
