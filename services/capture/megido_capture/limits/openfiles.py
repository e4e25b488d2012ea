"""How many files this process may have open: each client needs two."""

import logging
import resource

logger = logging.getLogger(__name__)

FILES_PER_CLIENT = 2
FILES_BESIDE = 200
"""Journal, segments, metrics, bus and what else is open beside the clients."""


def raise_open_files(clients: int) -> None:
    """Takes all the open files that this process may have, and warns when `clients` need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as error:
            logger.warning("the limit of %d open files cannot be raised: %s", soft, error)
    needed = clients * FILES_PER_CLIENT + FILES_BESIDE
    if clients and soft != resource.RLIM_INFINITY and soft < needed:
        logger.warning(
            "%d open files are allowed, too few for max_concurrent_clients=%d (about %d): raise `ulimit -n`",
            soft,
            clients,
            needed,
        )
