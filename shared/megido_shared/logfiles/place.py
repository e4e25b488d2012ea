"""Where log files are: the root of the start, or a folder below it that the configuration names."""

from pathlib import Path

from megido_shared.settings import DEFAULT_LOG_DIR


def below(root: Path, wanted: str) -> Path:
    """The folder that `log_directory` means. The default is the root itself, whatever that is called; any other
    relative path lies below it. Raises ValueError on a path that leads elsewhere, through a link too."""
    if wanted in ("", DEFAULT_LOG_DIR):
        return root
    found = root / wanted
    if ".." in found.parts or not found.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"log_directory {wanted!r} is not below {root}, where ingest's --log-dir keeps log files")
    return found
