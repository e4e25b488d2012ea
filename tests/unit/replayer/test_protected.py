"""What a replay must not reach, from the start of the replayer."""

import pytest

from megido_replayer.__main__ import parser, read_settings
from megido_shared.addresses import Endpoint


@pytest.mark.parametrize(
    ("url", "doors"),
    [
        ("postgresql://u@pg.internal:6000/db", [("pg.internal", 6000)]),
        ("postgresql://u@/db?host=a,b&port=5433,5434", [("a", 5433), ("b", 5434)]),
        ("postgresql://u@/db?host=pg.internal&hostaddr=10.0.0.5", [("pg.internal", 5432), ("10.0.0.5", 5432)]),
    ],
)
def test_every_server_of_the_database_is(url: str, doors: list[tuple[str, int]]) -> None:
    settings = read_settings(parser().parse_args(["--database-url", url]), {})
    assert {Endpoint(*door) for door in doors} <= set(settings.protected)
