from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from megido_api.settings import Settings
from megido_shared.bus.local import LocalBus
from megido_shared.datadir import DataDir
from megido_shared.settings import Common
from tests.integration.api.harness import Api, Ingest, running


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Settings:
    return Settings(common=Common(DataDir(tmp_path / "data").ensure(), database_url=database))


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    async with running(settings) as found:
        yield found


@pytest.fixture
async def ingest(settings: Settings) -> AsyncIterator[Ingest]:
    """The real store over the real bus, reading all the time."""
    worker = Ingest(LocalBus(settings.common.data_dir), settings.common.database_url)
    await worker.start()
    yield worker
    await worker.stop()
