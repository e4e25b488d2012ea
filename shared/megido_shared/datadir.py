"""The data directory: journals, local bus, embedded Postgres, certificate authority, last-known-good copies.

Only one layout, known here. Everything below it is 0700.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megido_shared.errors import ConfigurationError


def default_data_dir(env: Mapping[str, str]) -> Path:
    """`MEGIDO_DATA_DIR`, else `/var/lib/megido` for root, else `megido` in the XDG data home."""
    if given := env.get("MEGIDO_DATA_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/megido")
    home = env.get("XDG_DATA_HOME") or str(Path(env.get("HOME", "~")).expanduser() / ".local" / "share")
    return Path(home) / "megido"


@dataclass(frozen=True, slots=True)
class DataDir:
    root: Path

    @property
    def bus(self) -> Path:
        """Producers' slots and their segment files."""
        return self.root / "bus"

    @property
    def groups(self) -> Path:
        """Consumer groups: registrations, locks, acknowledged offsets."""
        return self.root / "groups"

    @property
    def config(self) -> Path:
        """Current configuration by scope (the local bus's compacted topic)."""
        return self.root / "config"

    @property
    def last_known_good(self) -> Path:
        """The configuration that a node applied last, for a start without a bus."""
        return self.root / "last-known-good"

    @property
    def ca(self) -> Path:
        """The certificate authority, in mitmproxy's file names (its `confdir`)."""
        return self.root / "ca"

    @property
    def postgres(self) -> Path:
        """The embedded Postgres, a directory a major version."""
        return self.root / "postgres"

    @property
    def run(self) -> Path:
        """Lock and run-time information of `megido up`."""
        return self.root / "run"

    @property
    def service_logs(self) -> Path:
        """What the child processes of `megido up` print."""
        return self.root / "service-logs"

    def ensure(self) -> "DataDir":
        """Makes the root, 0700. Raises ConfigurationError when it cannot be made or written."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.root / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)  # another thread of ours may probe at the same time
        except OSError as error:
            raise ConfigurationError(
                f"data directory {self.root} cannot be written ({error.strerror}); "
                "make it writable or choose another with --data-dir or MEGIDO_DATA_DIR"
            ) from error
        return self
