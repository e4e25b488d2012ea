"""What both layouts of the log files are to their writer."""

from pathlib import Path
from typing import Literal, Protocol, get_args

from megido_ingest.jsonlogs.entries import Entry
from megido_ingest.jsonlogs.lines import HourlyLines
from megido_ingest.jsonlogs.tree import LogTree

type LogLayout = Literal["tree", "ndjson", "off"]
LAYOUTS: tuple[LogLayout, ...] = get_args(LogLayout.__value__)


class Layout(Protocol):
    """Writes entries below its root. A round is what lies between two of the reader's positions in the feed: it is
    written again from its beginning when it was not committed. Methods raise OSError."""

    keeps_every_state: bool
    """Whether an entry may be written again when its flow has changed; otherwise flows that are open are left out."""

    def resume(self, position: int) -> None:
        """Before the first round of a session: everything up to `position` is committed, nothing behind it is."""

    def begin(self, position: int, last: int) -> None:
        """A round begins behind `position`; committed, the position is `last`."""

    def write(self, entry: Entry) -> None: ...

    def flush(self) -> None:
        """What was written is in the files when this returns."""

    def committed(self) -> None:
        """The round is."""

    def folder_of(self, kind: str, prefix: str) -> str | None:
        """The name of the folder below `kind` that is called `<prefix>_<digits>`; None when there is none."""

    def make(self, folder: str) -> None:
        """Makes the root and a folder below it, each 0700: what was captured is its owner's alone."""

    def close(self) -> None: ...


def layout_of(name: LogLayout, root: Path, inside: str) -> Layout:
    """Below `root`, in the folder `inside` of it (`""`: in the root itself)."""
    return HourlyLines(root, inside) if name == "ndjson" else LogTree(root, inside)
