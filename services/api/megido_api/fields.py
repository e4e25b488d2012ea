"""Types of what clients send: query parameters and posted fields, each with its check and its place in OpenAPI."""

import base64
import binascii
import json
import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from megido_shared.clock import to_us, utc

MAX_LIMIT = 10_000
_MAX_OFFSET = 2**31
_MAX_HEADERS_BYTES = 256 << 10
_MAX_TIME_US = 253_370_764_800 * 1_000_000  # the year 9999: what began before it ends before the year 10000
_MIN_TIME_US = -62_135_596_800 * 1_000_000  # the year 1


def clean(value: Any) -> Any:
    """Text with surrogate pairs joined and lone surrogates replaced: nothing behind us can hold one."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain NUL")
    return value


def to_time_us(value: Any) -> int | None:
    """Epoch seconds (a number, or its text) or ISO 8601 as microseconds; ValueError on anything else."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return _iso_us(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be epoch seconds or an ISO 8601 time")
    return _in_range(round(value * 1_000_000))


def _iso_us(value: str) -> int:
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be epoch seconds or an ISO 8601 time") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return _in_range(to_us(moment))


def _in_range(us: int) -> int:
    if not _MIN_TIME_US <= us < _MAX_TIME_US:
        raise ValueError("must lie in the years 1 to 9998 (in seconds, not milliseconds)")
    return us


def _to_bound(value: Any) -> UUID | datetime:
    """A flow_id or a time."""
    try:
        return UUID(str(value))
    except ValueError:
        us = to_time_us(value)
        assert us is not None
        return utc(us)


def _to_pairs(value: Any) -> list[tuple[bytes, bytes]]:
    """Header pairs, no more of them than a proxy would take."""
    pairs = _all_pairs(value)
    if sum(len(name) + len(one) for name, one in pairs) > _MAX_HEADERS_BYTES:
        raise ValueError(f"must not be larger than {_MAX_HEADERS_BYTES} bytes together")
    return pairs


def _all_pairs(value: Any) -> list[tuple[bytes, bytes]]:
    """Of an object, of JSON text of one, or of a list of pairs (order and duplicates kept)."""
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)  # unlike msgspec it takes lone surrogates, and so does a header
        except (ValueError, RecursionError) as error:
            raise ValueError("must be an object, or the JSON text of one") from error
    if value is None:
        return []
    if isinstance(value, dict):
        return [(_header_part(name), _header_part(one)) for name, many in value.items() for one in _many(many)]
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [(_header_part(name), _header_part(one)) for name, one in value]
    raise ValueError("must be an object, or the JSON text of one")


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _header_part(value: Any) -> bytes:
    if value is None:
        return b""
    if isinstance(value, dict | list):
        raise ValueError("header values must be text")
    return str(value).encode("utf-8", "surrogatepass")


def body_bytes(text: str | None, encoding: str) -> bytes:
    """The bytes of a posted body; ValueError when it is not the base64 that it claims to be."""
    if not text:
        return b""
    if encoding == "text":
        return text.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(text.encode("ascii", "replace"), validate=True)
    except binascii.Error as error:
        raise ValueError(f"is not base64 ({error})") from error


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _any_text(value: Any) -> str | None:
    """Checked here and not by pydantic, which refuses lone surrogates: a body is bytes in the end."""
    if value is not None and not isinstance(value, str):
        raise ValueError("must be text")
    return value


_TEXT = StringConstraints(max_length=65_536)
UPPER = BeforeValidator(_upper)
Text = Annotated[str, BeforeValidator(clean), _TEXT]
"""Posted text. NUL may come: what stores it as text replaces it."""
Name = Annotated[str, BeforeValidator(clean), StringConstraints(min_length=1, max_length=65_536)]
StoredText = Annotated[str, BeforeValidator(clean), AfterValidator(_no_nul), _TEXT]
"""Text that goes straight into a text column."""
BodyText = Annotated[Any, BeforeValidator(_any_text), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]})]
BodyEncoding = Literal["text", "base64"]
Headers = Annotated[
    Any,
    BeforeValidator(_to_pairs),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": {"type": "string"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
                {"type": "string", "description": "JSON text of such an object"},
                {"type": "null"},
            ]
        }
    ),
]
TimeUs = Annotated[
    int | None,
    BeforeValidator(to_time_us),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "description": "epoch seconds"}, {"type": "string"}, {"type": "null"}]}
    ),
]
Size = Annotated[int, Field(ge=0, le=2**62)]

Filter = Annotated[str | None, AfterValidator(lambda value: value and _no_nul(value)), Query(max_length=4096)]
Flag = Annotated[bool | None, BeforeValidator(lambda value: None if value == "" else value)]
"""A filter that is left blank does not filter, as with the others."""
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]
Offset = Annotated[int, Query(ge=0, le=_MAX_OFFSET)]
Cursor = Annotated[UUID | None, Query(description="`next_cursor` of the page before")]
Bound = Annotated[
    UUID | datetime | None,
    BeforeValidator(_to_bound),
    WithJsonSchema({"type": "string", "description": "a flow_id, epoch seconds or ISO 8601"}),
    Query(),
]
