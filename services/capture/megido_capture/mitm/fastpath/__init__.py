"""Replacements of mitmproxy's hot spots, behaviour kept. Only our own master uses them, and `--no-fastpath` does not.

Few, and only what costs much and proves little: each module names what it replaces and why it may be.
`scripts/mitmproxy_tests.py` runs mitmproxy's own tests with all of them in place.
"""

from megido_capture.mitm.fastpath import endings, handler, heads, layers, messages, tls
from megido_capture.mitm.fastpath.options import Options
from megido_capture.mitm.versions import require_tested

__all__ = ["Options", "replace_hot_spots", "stand_in_front"]

_in_place = False


def replace_hot_spots() -> None:
    """Puts the replacements in place, for this process and for good. Raises ConfigurationError, and nothing is touched,
    on a version not tested against."""
    require_tested()
    messages.replace()
    layers.replace()
    tls.replace()
    endings.replace()
    handler.replace()
    heads.replace()
    global _in_place  # noqa: PLW0603 - what it tells of is there once
    _in_place = True


def stand_in_front() -> None:
    """To be called when the layers have been wrapped, as a node does: usual input need not go through the wrappers.
    Nothing where the fast path is not in place."""
    if _in_place:
        heads.replace()
