"""Bringing a database's schema up to date: `megido migrate`, and whoever starts a database of its own."""

from importlib import resources

import sqlalchemy as sa
from alembic import command, op
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from megido_shared.db.connect import hide_password, parse_url
from megido_shared.errors import ConfigurationError, Unavailable

MINIMUM_SERVER = 15
DAYS_AHEAD = 7
_LOCK = "SELECT pg_advisory_lock(hashtext('megido.migrate'))"
_UNLOCK = "SELECT pg_advisory_unlock(hashtext('megido.migrate'))"
_TODAY = "(now() AT TIME ZONE 'UTC')::date"
PARTITIONS_AHEAD = f"SELECT ensure_partitions({_TODAY} - 1, {_TODAY} + {DAYS_AHEAD})"
"""Makes the partitions from yesterday to `DAYS_AHEAD` days ahead; answers how many were missing."""


def migrate(url: str) -> None:
    """Applies what is missing; nothing when the schema is current. Several callers at once wait for each other.

    Raises Unavailable when the server cannot be reached, ConfigurationError when it is too old or its schema is
    newer than this version of Megido.
    """
    with _connect(url) as connection:
        _check_server(connection)
        connection.exec_driver_sql(_LOCK)
        connection.commit()  # the lock is the session's: it outlives this transaction
        try:
            _upgrade(connection)
            connection.exec_driver_sql(PARTITIONS_AHEAD)
            connection.commit()
        finally:
            connection.rollback()
            connection.exec_driver_sql(_UNLOCK)
            connection.commit()


def revision(url: str) -> str | None:
    """The schema's revision; None in an empty database. Raises Unavailable."""
    with _connect(url) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head() -> str:
    """The revision that this version of Megido needs."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    assert found is not None
    return found


def require_current(url: str) -> None:
    """Raises ConfigurationError unless the schema is what this version needs, Unavailable without a server."""
    found = revision(url)
    if found != head():
        state = f"is at revision {found}" if found else "has no tables yet"
        raise ConfigurationError(f"the database {state}, {head()} is needed; run: megido migrate")


def run_sql(name: str) -> None:
    """Runs a file of `migrations/sql` as it is, inside the migration's transaction."""
    text = resources.files("megido_shared.db.migrations").joinpath("sql", name).read_text(encoding="utf-8")
    op.get_bind().exec_driver_sql(text, execution_options={"no_parameters": True})


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "megido_shared.db:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _upgrade(connection: sa.Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(f"this database belongs to a newer Megido ({error}); update Megido") from error


def _connect(url: str) -> sa.Connection:
    engine = sa.create_engine(
        parse_url(url), poolclass=NullPool, connect_args={"connect_timeout": 5, "application_name": "megido migrate"}
    )
    try:
        return engine.connect()
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise Unavailable(f"the database {hide_password(url)} cannot be reached: {reason}") from error


def _check_server(connection: sa.Connection) -> None:
    version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) // 10_000
    if version < MINIMUM_SERVER:
        raise ConfigurationError(f"Postgres {MINIMUM_SERVER} or newer is needed, this one is {version}")
