"""Replacements of mitmproxy's hot spots, behaviour kept. Only our own master uses them, and `--no-fastpath` does not.

Few, and only what costs much and proves little: each module names what it replaces and why it may be.
`scripts/mitmproxy_tests.py` runs mitmproxy's own tests with all of them in place.
"""

import logging

from mitmproxy import version

from megido_capture.fastpath import endings, handler, heads, layers, messages, tls
from megido_capture.fastpath.options import Options

__all__ = ["TESTED", "Options", "replace_hot_spots", "stand_in_front"]

logger = logging.getLogger(__name__)

TESTED = ((12, 2), (12, 3))
"""Versions of mitmproxy that the replacements were tested with; on any other they are left out."""

_in_place = False


def replace_hot_spots() -> bool:
    """Puts the replacements in place, for this process and for good. False on a version not tested against."""
    found = tuple(int(part) for part in version.VERSION.split(".")[:2])
    if found not in TESTED:
        logger.warning("running without the fast path: not tested with mitmproxy %s", version.VERSION)
        return False
    messages.replace()
    layers.replace()
    tls.replace()
    endings.replace()
    handler.replace()
    heads.replace()
    global _in_place  # noqa: PLW0603 - what it tells of is there once
    _in_place = True
    return True


def stand_in_front() -> None:
    """To be called when the layers have been wrapped, as a node does: usual input need not go through the wrappers.
    Nothing where the fast path is not in place."""
    if _in_place:
        heads.replace()
