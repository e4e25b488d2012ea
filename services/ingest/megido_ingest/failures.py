"""Postgres' errors by what ingest must do about them."""

import psycopg

from megido_shared.errors import MegidoError, Unavailable

_RETRY = frozenset({"40P01", "40001", "55P03"})
"""Deadlock, serialization failure, lock timeout: the same transaction again."""
_DATA = frozenset({"21", "22", "23", "54"})
"""Cardinality, data exception, constraint, program limit: one of the records is to blame."""
_STALE = "MG001"


class StaleClaim(MegidoError):
    """Another worker has claimed streams of this batch: their records are its business now.

    An empty detail means that this database knows none of our claims (it was made anew).
    """

    def __init__(self, detail: str) -> None:
        super().__init__("streams were claimed by another worker")
        self.detail = detail


def is_retry(error: psycopg.Error) -> bool:
    return error.sqlstate in _RETRY


def is_missing_partition(error: psycopg.Error) -> bool:
    return isinstance(error, psycopg.errors.CheckViolation) and "no partition of relation" in str(error)


def is_data(error: psycopg.Error) -> bool:
    return (error.sqlstate or "")[:2] in _DATA and not is_missing_partition(error)


def is_stale(error: psycopg.Error) -> bool:
    return error.sqlstate == _STALE


def stale(error: psycopg.Error) -> StaleClaim:
    return StaleClaim(error.diag.message_detail or "[]")


def unavailable(error: Exception) -> Unavailable:
    """Everything else: the database is away, full, shutting down or not as it should be. Nothing is lost by
    waiting, and every reason but a defect of ours passes or is mended by somebody."""
    state = getattr(error, "sqlstate", None)
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return Unavailable(f"database: {text}" + (f" (SQLSTATE {state})" if state else ""))
