"""Rows as Postgres' binary composites, made off the event loop: one bytes object a row, joined into arrays.

psycopg's own dumpers cost about a microsecond a value; a flow has fifty.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

from psycopg import AsyncConnection
from psycopg.adapt import Dumper
from psycopg.pq import Format

OIDS = {
    "boolean": 16,
    "bytea": 17,
    "bigint": 20,
    "smallint": 21,
    "integer": 23,
    "text": 25,
    "date": 1082,
    "timestamptz": 1184,
    "uuid": 2950,
}
_FIXED = {
    "boolean": struct.Struct(">?"),
    "bigint": struct.Struct(">q"),
    "smallint": struct.Struct(">h"),
    "integer": struct.Struct(">i"),
    "date": struct.Struct(">i"),
    "timestamptz": struct.Struct(">q"),
}
_NULL_LENGTH = b"\xff\xff\xff\xff"
_PREFIXED = 4096

EPOCH_2000_US = 946_684_800_000_000
"""Postgres counts time from 2000-01-01: subtract this from microseconds since 1970."""
EPOCH_2000_DAYS = 10_957


def header(type_name: str, length: int) -> bytes:
    """What goes before a field's value: its type and length."""
    return struct.pack(">Ii", OIDS[type_name], length)


def null(type_name: str) -> bytes:
    """A whole field that is null."""
    return struct.pack(">I", OIDS[type_name]) + _NULL_LENGTH


class Lengths(dict[int, bytes]):
    """Field headers of a type of varying length, by length, most of them made once. (A dict, so that finding one is
    no call.)"""

    def __init__(self, type_name: str) -> None:
        super().__init__((n, header(type_name, n)) for n in range(_PREFIXED))
        self._type = type_name

    def __missing__(self, length: int) -> bytes:
        return header(self._type, length)


text_header = Lengths("text")
bytea_header = Lengths("bytea")


def _packer(type_name: str) -> Callable[[Any], bytes]:
    if type_name == "text":
        return lambda value: text_header[len(raw := value.encode())] + raw
    if type_name == "bytea":
        return lambda value: bytea_header[len(value)] + value
    if type_name == "uuid":
        head = header("uuid", 16)
        return lambda value: head + value
    form = _FIXED[type_name]
    head = header(type_name, form.size)
    return lambda value: head + form.pack(value)


class RowType:
    """A composite type of the schema: its name, and its fields as (name, type) in order."""

    def __init__(self, name: str, fields: Sequence[tuple[str, str]]) -> None:
        self.name = name
        self.fields = tuple(fields)
        self.count = struct.pack(">i", len(self.fields))
        self._packers = [(_packer(kind), null(kind)) for _, kind in self.fields]

    def pack(self, *values: Any) -> bytes:
        """One row. Values are int, bool, str, bytes (uuid: 16) or None, in the order of the fields. Raises
        struct.error for a number that the type cannot hold."""
        parts = [self.count]
        parts += [
            missing if value is None else packer(value)
            for (packer, missing), value in zip(self._packers, values, strict=True)
        ]
        return b"".join(parts)


class Packed(bytes):
    """A parameter in Postgres' binary format, whatever its type."""


class _PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Packed) -> Packed:
        return obj


def register(connection: AsyncConnection[Any]) -> None:
    """Lets `Packed` parameters through as they are."""
    connection.adapters.register_dumper(Packed, _PackedDumper)


def array(element_oid: int, rows: Sequence[bytes]) -> Packed:
    """A one-dimensional array of packed values."""
    if not rows:
        return Packed(struct.pack(">iiI", 0, 0, element_oid))
    pack_length = struct.Struct(">i").pack
    parts = [struct.pack(">iiIii", 1, 0, element_oid, len(rows), 1)]
    for row in rows:
        parts.append(pack_length(len(row)))
        parts.append(row)
    return Packed(b"".join(parts))
