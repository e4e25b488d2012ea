"""What readiness says."""


class Health:
    """Reasons why ingest is not ready; empty strings where it is."""

    def __init__(self) -> None:
        self.database = "database: not reached yet"
        self.bus = "bus: not reached yet"
        self.consuming = False
        self.held = ""

    def missing(self) -> list[str]:
        """For `/readyz`; called from another thread."""
        found = [self.database, self.bus, self.held, "" if self.consuming else "consumer: not running"]
        return [reason for reason in found if reason]
