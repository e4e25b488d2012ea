"""Where a database URL leads, in every form that libpq and SQLAlchemy read."""

import pytest

from megido_shared.addresses import database_endpoints
from megido_shared.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("", []),
        ("postgresql:///x", []),
        ("postgresql:///x?host=/run/pg&port=5433", []),
        ("postgresql://%2Frun%2Fpg/x", []),
        ("postgresql://u:p%40w@a/x", ["a 5432"]),
        ("postgresql+psycopg://u:p@[2001:db8::1]:6432/x", ["2001:db8::1 6432"]),
        ("postgresql://[2001:db8::1]/x", ["2001:db8::1 5432"]),
        ("postgresql://a:1,b:2,c/x", ["a 1", "b 2", "c 5432"]),
        ("postgresql://a,b/x?port=1,2", ["a 1", "b 2"]),
        ("postgresql:///x?host=a,b&port=5433,5434", ["a 5433", "b 5434"]),
        ("postgresql:///x?host=a,b&port=5433", ["a 5433", "b 5433"]),
        ("postgresql:///x?host=a,b&port=,5434", ["a 5432", "b 5434"]),
        ("postgresql:///x?host=a,b", ["a 5432", "b 5432"]),
        ("postgresql:///x?host=/run/pg,b&port=5433,5434", ["b 5434"]),
        ("postgresql:///x?host=a:5433&host=b:5434", ["a 5433", "b 5434"]),
        ("postgresql:///x?host=::1&port=5433", ["::1 5433"]),
        ("postgresql://a:5433/x?port=5434", ["a 5433", "a 5434"]),
        ("postgresql://a:5433/x?host=b", ["a 5433", "b 5433"]),
        ("postgresql://u@:5433/x?host=b", ["b 5433"]),
        ("postgresql:///x?hostaddr=192.0.2.1", ["192.0.2.1 5432"]),
        ("postgresql:///x?hostaddr=192.0.2.1,2001:db8::1&port=5433,5434", ["192.0.2.1 5433", "2001:db8::1 5434"]),
        ("postgresql://a:5433/x?hostaddr=192.0.2.1", ["a 5433", "192.0.2.1 5433"]),
        ("postgresql://a:1,b:2/x?hostaddr=192.0.2.1,192.0.2.2", ["a 1", "b 2", "192.0.2.1 1", "192.0.2.2 2"]),
        ("postgresql:///x?host=a&hostaddr=192.0.2.1&port=5433", ["a 5433", "192.0.2.1 5433"]),
    ],
)
def test_servers(url: str, servers: list[str]) -> None:
    assert [f"{server.host} {server.port}" for server in database_endpoints(url)] == servers


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret@a:abc/x",
        "postgresql://u:secret@a:0/x",
        "postgresql://u:secret@a:65536/x",
        "postgresql://u:secret@a,b,c/x?port=1,2",
        "postgresql://u:secret@/x?host=a,b,c&port=1,2",
        "postgresql://u:secret@/x?host=a&port=x",
        "postgresql://u:secret@/x?hostaddr=192.0.2.1,192.0.2.2,192.0.2.3&port=1,2",
        "postgresql://u:secret/@a:1/x",
        "postgresql://u:secret@[::1/x",
        "postgresql://u:secret@/x?service=main",
        "host=a port=1 password=secret",
    ],
)
def test_what_cannot_be_read_is_refused_and_not_guessed(url: str) -> None:
    with pytest.raises(ConfigurationError, match="the database URL") as raised:
        database_endpoints(url)
    assert "secret" not in str(raised.value)
