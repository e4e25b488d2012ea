"""Settings that several services share. Read once, at each service's start, and passed on from there."""

from collections.abc import Mapping
from dataclasses import dataclass

from megido_shared.datadir import DataDir, default_data_dir

DEFAULT_API_URL = "http://localhost:8000"
DEFAULT_MAX_BODY_SIZE = 1_048_576
DEFAULT_LOG_DIR = "logs/proxy"


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
