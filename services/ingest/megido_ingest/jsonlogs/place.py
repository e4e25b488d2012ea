"""Where the log files go: the root of the start, or a folder below it that the configuration names."""

import logging
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from megido_shared.db.tables import config_snapshots
from megido_shared.logfiles import below

log = logging.getLogger(__name__)


class Directory:
    """Follows `log_directory`. What cannot be is told once, and the files stay where they go."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root
        self.refused = ""

    async def wanted(self, connection: AsyncConnection) -> Path:
        """Where the files should go now; where they go already when the configuration names no folder of ours."""
        setting = config_snapshots.c.settings["log_directory"].astext
        named = await connection.scalar(select(setting).where(config_snapshots.c.scope == "global"))
        try:
            path = below(self.root, named or "")
        except (ValueError, OSError) as error:
            if str(error) != self.refused:
                log.warning("JSON logs stay in %s: %s", self.path, error)
            self.refused = str(error)
            return self.path
        self.refused = ""
        return path
