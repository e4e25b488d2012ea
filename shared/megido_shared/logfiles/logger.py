"""The founding document's `ProxyLogger`: recent entries and clean-up from a script, on the machine of the files."""

import os
from pathlib import Path
from typing import Any, cast

from megido_shared.logfiles.cleaning import cleanup
from megido_shared.logfiles.reading import Kind, recent
from megido_shared.settings import DEFAULT_LOG_DIR


class ProxyLogger:
    """Reads and tidies the log files below `log_directory`; without one, those of PROXY_LOG_DIR or `logs/proxy`."""

    def __init__(self, log_directory: str | Path = "") -> None:
        self.log_directory = Path(log_directory or os.environ.get("PROXY_LOG_DIR") or DEFAULT_LOG_DIR)

    def get_recent_logs(self, log_type: str = "requests", limit: int = 100) -> list[dict[str, Any]]:
        """The newest entries, newest first. `log_type`: requests, responses, websockets, errors or auth; ValueError on
        another."""
        return recent(self.log_directory, cast(Kind, log_type), limit)

    def cleanup_old_logs(self, days_to_keep: int = 30) -> int:
        """Removes the files of days (UTC) that ended more than `days_to_keep` days ago. Returns how many went."""
        return cleanup(self.log_directory, days_to_keep)
