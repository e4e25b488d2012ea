"""The certificate authority that every node of a data directory shares."""

import fcntl
import os
from pathlib import Path

from mitmproxy.certs import CertStore
from mitmproxy.options import CONF_BASENAME

from megido_shared.errors import ConfigurationError

BASENAME = CONF_BASENAME
"""How the authority's files begin."""


def ensure(directory: Path, key_size: int = 2048) -> None:
    """Makes the authority once, also when several nodes start at the same time. The directory is 0700, what holds
    the key 0600. Raises ConfigurationError when it cannot be written."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / f"{BASENAME}-dhparam.pem").exists():
                CertStore.from_store(directory, BASENAME, key_size)
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigurationError(
            f"the certificate authority in {directory} cannot be made: {error.strerror}"
        ) from error
