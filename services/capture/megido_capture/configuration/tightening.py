"""What of a refused configuration is put in force all the same: whatever restricts, and nothing that permits more."""

from collections.abc import Iterable
from dataclasses import replace

from megido_capture.configuration.settings import CaptureSettings
from megido_shared.config_fields import Invalid, check_value
from megido_shared.networks import Network, entries, parse_networks

_CREDENTIALS = ("auth_username", "auth_password", "auth_token", "auth_password_hash", "auth_token_hash")
NOBODY = "ip_whitelist leaves nobody who was allowed before"


def tightened(base: CaptureSettings, wanted: CaptureSettings) -> tuple[CaptureSettings, str]:
    """`base` under the restrictions of `wanted` too, and why nobody may be served under the two, "" when some may.

    Credentials are asked for when either asks; those that count are `wanted`'s: what was withdrawn is accepted no
    more, and what is left may be none. Clients must be in both whitelists and in neither blacklist, and destinations
    of either list are blocked. A list of `wanted` that cannot be read says nothing.
    """
    allowed, nobody = _common(base.ip_whitelist, _readable("ip_whitelist", wanted.ip_whitelist))
    found = replace(
        base,
        auth_required=base.auth_required or wanted.auth_required,
        ip_whitelist=allowed,
        ip_blacklist=_either(base.ip_blacklist, _readable("ip_blacklist", wanted.ip_blacklist)),
        blocked_destinations=_either(
            base.blocked_destinations, _readable("blocked_destinations", wanted.blocked_destinations)
        ),
        **{name: getattr(wanted, name) for name in _CREDENTIALS},
    )
    return found, NOBODY if nobody else ""


def _readable(name: str, value: str) -> str:
    try:
        check_value(name, value)
    except Invalid:
        return ""
    return value


def _either(one: str, other: str) -> str:
    return one if not other or one == other else ", ".join(dict.fromkeys([*entries(one), *entries(other)]))


def _common(one: str, other: str) -> tuple[str, bool]:
    """The whitelist that both make together, and whether nobody is in both; an empty one is everybody."""
    if not entries(one) or not entries(other) or one == other:
        return one or other, False
    both = [
        smaller
        for first in parse_networks(one)
        for second in parse_networks(other)
        if (smaller := _overlap(first, second)) is not None
    ]
    return _joined(both) or one, not both


def _overlap(first: Network, second: Network) -> Network | None:
    """Two networks are one inside the other, or apart."""
    if first.version != second.version or not first.overlaps(second):
        return None
    return max(first, second, key=lambda network: network.prefixlen)


def _joined(networks: Iterable[Network]) -> str:
    return ", ".join(str(network) for network in networks)
