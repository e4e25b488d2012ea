"""The certificate authority that every node of a data directory shares."""

import fcntl
import logging
import os
from pathlib import Path

from mitmproxy.certs import CertStore
from mitmproxy.options import CONF_BASENAME

from megido_shared.errors import ConfigurationError

logger = logging.getLogger(__name__)

BASENAME = CONF_BASENAME
"""How the authority's files begin."""


KEYS = (f"{BASENAME}-ca.pem", f"{BASENAME}-ca.p12")
"""The files that hold the private key."""


def ensure(directory: Path, key_size: int = 2048) -> None:
    """Makes the authority once, also when several nodes start at the same time. The directory is 0700, what holds
    the key 0600, also when they were there already. Raises ConfigurationError when it cannot be written."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / f"{BASENAME}-dhparam.pem").exists():
                CertStore.from_store(directory, BASENAME, key_size)
            _tighten(directory, 0o700)
            for name in KEYS:
                _tighten(directory / name, 0o600)
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigurationError(
            f"the certificate authority in {directory} cannot be made: {error.strerror}"
        ) from error


def _tighten(path: Path, mode: int) -> None:
    """Takes what is more than `mode` away, as far as it is ours; a volume's owner may be somebody else."""
    found = path.stat()
    if found.st_mode & 0o777 & ~mode:
        if found.st_uid == os.geteuid():
            path.chmod(found.st_mode & mode)
        else:
            logger.warning("%s can be read by others, and belongs to somebody else", path)
