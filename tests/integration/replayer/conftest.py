from pathlib import Path

import pytest

from tests.integration.replayer.harness import World


@pytest.fixture
def world(database: str, tmp_path: Path) -> World:
    return World(database, tmp_path)
