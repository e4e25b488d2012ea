"""How every benchmark reports: progress on stderr, one JSON object on stdout's last line, the same in a file."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"


def say(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


def facts(*packages: str) -> dict[str, object]:
    """The machine and the versions that a figure depends on."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The ratio of the medians, to three digits."""
    return round(median(ours) / median(theirs), 3)


def finish(
    name: str, figures: Mapping[str, object], *, detail: Mapping[str, object], packages: tuple[str, ...]
) -> None:
    """Prints `figures` as the last line and writes them with `detail` and the facts to `results/<name>.json`.

    A figure that was not measured is left out by the caller, never None or 0.
    """
    RESULTS.mkdir(exist_ok=True)
    document = {**figures, "detail": detail, "machine": facts(*packages)}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
