"""What the replayer depends on, as it was when last tried; read by the probes' thread."""


class Health:
    """Reasons for not being ready, by what is missing. Assignments are atomic, so no lock."""

    def __init__(self) -> None:
        self._missing: dict[str, str] = {"database": "not reached yet", "bus": "not reached yet"}

    def good(self, what: str) -> None:
        self._missing.pop(what, None)

    def bad(self, what: str, why: str) -> None:
        self._missing[what] = why

    def missing(self) -> list[str]:
        return [f"{what}: {why}" for what, why in list(self._missing.items())]
