from pathlib import Path

import pytest

from tests.integration.jsonlogs.rows import Store


@pytest.fixture
def store(database: str) -> Store:
    return Store(database)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "proxy"
