"""Settings that several services share. Read once, at each service's start, and passed on from there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megido_shared.datadir import DataDir, default_data_dir
from megido_shared.errors import ConfigurationError

DEFAULT_API_URL = "http://localhost:8000"
DEFAULT_MAX_BODY_SIZE = 1_048_576
DEFAULT_LOG_DIR = "logs/proxy"
DEFAULT_JOURNAL_CAP = "4GiB"
MIN_JOURNAL_CAP = 1 << 20
METRICS_PORTS = {"capture": 9490, "replayer": 9480, "ingest": 9470, "forwarder": 9460}
"""Of probes and metrics, by service: on loopback, unless it is told another. The API has them on its own port."""

_SIZE = re.compile(r"(\d{1,18}) ?([kmgt]i?)?b?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Common:
    """Where the data directory, the bus and the database are. Without `kafka` the bus is the local one."""

    data_dir: DataDir
    kafka: str = ""
    database_url: str = ""


def common_from_env(env: Mapping[str, str], *, data_dir: str = "", kafka: str = "", database_url: str = "") -> Common:
    """Flags win over MEGIDO_DATA_DIR, MEGIDO_KAFKA (host:port[,…]) and MEGIDO_DATABASE_URL."""
    environment = dict(env)
    if data_dir:
        environment["MEGIDO_DATA_DIR"] = data_dir
    return Common(
        data_dir=DataDir(default_data_dir(environment)),
        kafka=kafka or env.get("MEGIDO_KAFKA", ""),
        database_url=database_url or env.get("MEGIDO_DATABASE_URL", ""),
    )


def parse_size(name: str, text: str, least: int = 0) -> int:
    """Bytes of a size like `512MiB`, `4GB`, `4g` (units of 1024) or plain `1048576`. Raises ConfigurationError, naming
    the setting."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigurationError(f"{name} is {text!r}; it must be a size like 512MiB, 4GiB or a number of bytes")
    size: int = int(found[1]) * 1024 ** _UNITS[(found[2] or "").lower().removesuffix("i")]
    if size < least:
        raise ConfigurationError(f"{name} is {text}; it must be {least} bytes at least")
    return size
