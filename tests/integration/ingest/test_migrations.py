"""The migrations make exactly what `tables.py` declares, on each Postgres, any number of times."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from megido_shared import ids
from megido_shared.db import migrate, tables
from megido_shared.db.connect import conninfo, parse_url
from megido_shared.errors import ConfigurationError, Unavailable

PARTITIONED = (
    "flows",
    "bodies",
    "body_chunks",
    "websocket_messages",
    "errors",
    "auth_attempts",
    "flow_lines",
    "flow_text",
)


def _type(column_type: sa.types.TypeEngine) -> str:
    text = column_type.compile(dialect=postgresql.dialect())
    return text.split(" COLLATE")[0]


def _described(table: sa.Table) -> list[tuple]:
    return [(c.name, _type(c.type), c.nullable, c.primary_key) for c in table.columns]


def test_the_migrations_equal_the_tables(any_database: str) -> None:
    engine = sa.create_engine(parse_url(any_database))
    made = sa.MetaData()
    with engine.connect() as connection:
        leaves = set(connection.scalars(sa.text("SELECT relname FROM pg_class WHERE relispartition")))
        made.reflect(connection)
        sequences = set(sa.inspect(connection).get_sequence_names())
    engine.dispose()
    names = set(made.tables) - leaves - {"alembic_version"}
    assert names == set(tables.metadata.tables)
    for name, declared in tables.metadata.tables.items():
        assert _described(made.tables[name]) == _described(declared), name
        assert [c.name for c in made.tables[name].primary_key] == [c.name for c in declared.primary_key], name
        for column in declared.columns:
            found = made.tables[name].columns[column.name].identity
            assert (found is None) == (column.identity is None), (name, column.name)
    assert {s.name for s in tables.metadata._sequences.values()} <= sequences


def test_migrating_again_changes_nothing(any_database: str) -> None:
    before = _dump(any_database)
    migrate.migrate(any_database)
    migrate.migrate(any_database)
    migrate.require_current(any_database)
    assert _dump(any_database) == before


def test_callers_at_once_wait_for_each_other(empty_database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate.migrate, [empty_database] * 4))
    assert migrate.revision(empty_database) == migrate.head()


def test_an_empty_or_newer_schema_is_told_in_one_line(empty_database: str) -> None:
    with pytest.raises(ConfigurationError, match="megido migrate"):
        migrate.require_current(empty_database)
    migrate.migrate(empty_database)
    with psycopg.connect(conninfo(empty_database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="newer"):
        migrate.migrate(empty_database)


def test_a_server_that_is_away_is_told_in_one_line() -> None:
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        migrate.migrate("postgresql://somebody:secret@127.0.0.1:1/nothing")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_partitions_reach_from_yesterday_to_a_week_ahead(any_database: str) -> None:
    today = datetime.now(UTC).date()
    with psycopg.connect(conninfo(any_database)) as connection:
        for parent in PARTITIONED:
            leaves = {
                name
                for (name,) in connection.execute(
                    "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = inhrelid"
                    " WHERE inhparent = %s::regclass",
                    [parent],
                )
            }
            wanted = {f"{parent}_{today + timedelta(days=n):%Y%m%d}" for n in range(-1, 8)}
            assert wanted <= leaves


def test_a_partition_takes_the_ids_of_its_day(any_database: str) -> None:
    day = datetime(2031, 7, 5, tzinfo=UTC)
    last = day + timedelta(days=1) - timedelta(milliseconds=1)
    with psycopg.connect(conninfo(any_database)) as connection:
        made = connection.execute("SELECT ensure_partitions('2031-07-05', '2031-07-05')").fetchone()
        assert made == (len(PARTITIONED),)
        assert connection.execute("SELECT ensure_partitions('2031-07-05', '2031-07-05')").fetchone() == (0,)
        for moment in (day, last):
            connection.execute(
                "INSERT INTO body_chunks VALUES (%s, 0, 0, '\\x00')", [ids.to_uuid(ids.floor_id(moment).bytes)]
            )
        assert connection.execute("SELECT count(*) FROM body_chunks_20310705").fetchone() == (2,)
        with pytest.raises(psycopg.errors.CheckViolation, match="no partition"):
            connection.execute(
                "INSERT INTO body_chunks VALUES (%s, 0, 0, '\\x00')",
                [ids.to_uuid(ids.floor_id(day + timedelta(days=1)).bytes)],
            )


def _dump(url: str) -> list[tuple]:
    with psycopg.connect(conninfo(url)) as connection:
        return connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable, ordinal_position FROM information_schema.columns"
            " WHERE table_schema = 'public' ORDER BY 1, 5"
        ).fetchall()
