"""How Postgres is reached: an engine for reads, raw psycopg connections for ingest's writes and for LISTEN.

A URL is `postgresql://user:password@host:port/database`; a unix socket's folder goes into `?host=/folder`.
Every connection notices a dead peer by itself (psycopg #1371: a half-open socket defeats asyncio's timeouts).
"""

from typing import Any

import psycopg
from psycopg.rows import TupleRow
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine as _create_async_engine

from megido_shared.errors import ConfigurationError

CONNECT_TIMEOUT_S = 5
_TCP: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


_PLANNED_FOR_THE_VALUES = "-c plan_cache_mode=force_custom_plan"
"""A plan for any value can use no partial index and knows nothing of common and rare values; planning takes less than
what a wrong plan costs."""


def parse_url(url: str) -> URL:
    """The URL with the driver that we use. Raises ConfigurationError on anything that is no Postgres URL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError(f"not a database URL: {hide_password(url)}") from error
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ConfigurationError(f"a postgresql:// URL is needed, not {parsed.drivername}://")
    return parsed.set(drivername="postgresql+psycopg")


def create_engine(
    url: str,
    *,
    application_name: str = "megido",
    statement_timeout_ms: int = 0,
    lock_timeout_ms: int = 0,
    idle_in_transaction_ms: int = 0,
    **options: Any,
) -> AsyncEngine:
    """An engine over psycopg's async driver; `options` are SQLAlchemy's; a timeout of 0 is none (for
    locks and idle transactions: the server's own). Nothing is connected yet.

    A connection that died in the pool (a restarted server) is replaced before use.
    """
    options_of_session = f"{_server_options(statement_timeout_ms)} {_PLANNED_FOR_THE_VALUES}"
    if lock_timeout_ms:
        options_of_session += f" -c lock_timeout={lock_timeout_ms}"
    if idle_in_transaction_ms:
        options_of_session += f" -c idle_in_transaction_session_timeout={idle_in_transaction_ms}"
    connect_args = {"application_name": application_name, "options": options_of_session}
    return _create_async_engine(
        parse_url(url),
        **({"pool_pre_ping": True, "connect_args": _TCP | connect_args} | options),
    )


async def connect(
    url: str, *, application_name: str = "megido", statement_timeout_ms: int = 0
) -> psycopg.AsyncConnection[TupleRow]:
    """One raw connection in autocommit mode. Raises psycopg.OperationalError when the server is away."""
    return await psycopg.AsyncConnection.connect(
        conninfo(url),
        autocommit=True,
        **_TCP,
        application_name=application_name,
        options=_server_options(statement_timeout_ms),
    )


def conninfo(url: str) -> str:
    """The URL as libpq reads it (without SQLAlchemy's driver name)."""
    return parse_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def hide_password(url: str) -> str:
    """For messages and logs."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(unreadable)"


def _server_options(statement_timeout_ms: int) -> str:
    return f"-c timezone=UTC -c statement_timeout={statement_timeout_ms}"
