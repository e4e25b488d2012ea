"""The policy: one row in Postgres, 0 everywhere until somebody changes it."""

from typing import NamedTuple

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import retention_policy

MAX_DAYS = 36_500
MAX_BYTES = 1 << 60
MAX_MINUTES = 10_080
CHANNEL = "megido_retention"
"""Notified when a run is asked for."""


class Field(NamedTuple):
    default: int
    low: int
    high: int
    help: str


FIELDS: dict[str, Field] = {
    "days": Field(0, 0, MAX_DAYS, "Days (UTC) that rows are kept for, beside today; 0: for ever."),
    "max_bytes": Field(0, 0, MAX_BYTES, "Bytes that the database may have on disk; 0: any number."),
    "log_days": Field(0, 0, MAX_DAYS, "Days that log files are kept for, beside today; 0: for ever."),
    "log_max_bytes": Field(0, 0, MAX_BYTES, "Bytes that log files may have on disk; 0: any number."),
    "every_minutes": Field(60, 0, MAX_MINUTES, "Minutes between scheduled runs; 0: only when asked for."),
}


class Policy(msgspec.Struct, frozen=True):
    """0 is no limit."""

    days: int = FIELDS["days"].default
    max_bytes: int = FIELDS["max_bytes"].default
    log_days: int = FIELDS["log_days"].default
    log_max_bytes: int = FIELDS["log_max_bytes"].default
    every_minutes: int = FIELDS["every_minutes"].default

    @property
    def limits_rows(self) -> bool:
        return bool(self.days or self.max_bytes)

    @property
    def limits_logs(self) -> bool:
        return bool(self.log_days or self.log_max_bytes)


NOTHING = Policy()


def check(name: str, value: int) -> str:
    """Why the field cannot have the value; empty when it can."""
    field = FIELDS[name]
    return "" if field.low <= value <= field.high else f"must be between {field.low} and {field.high}, not {value}"


async def read_policy(connection: AsyncConnection) -> Policy:
    """The policy in force."""
    columns = [retention_policy.c[name] for name in FIELDS]
    row = (await connection.execute(select(*columns))).one_or_none()
    return NOTHING if row is None else Policy(**row._mapping)
