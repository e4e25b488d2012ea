"""What the API asks of the replayer: the options of a job, kept as JSON in `replay_jobs.options`."""

import msgspec
from msgspec import Struct


class ReplayOptions(Struct, omit_defaults=True, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one job. `target_url`: another scheme, host and port; its path too when it has one of its own
    beyond "/". `delay_s` between items; `timeout_s` bounds one send as a whole, connect included. `protect` are more
    endpoints of Megido's (`host:port`) that are never replayed to: where the API that made the job listens."""

    target_url: str = ""
    verify_tls: bool = True
    timeout_s: float = 30.0
    delay_s: float = 0.0
    follow_redirects: int = 0
    max_response_bytes: int = 10 << 20
    allow_loopback: bool = False
    protect: tuple[str, ...] = ()


def to_json(options: ReplayOptions) -> str:
    return msgspec.json.encode(options).decode()


def from_json(raw: str | bytes | dict[str, object]) -> ReplayOptions:
    """Raises msgspec.ValidationError with the field's path on a bad value."""
    if isinstance(raw, dict):
        return msgspec.convert(raw, ReplayOptions)
    return msgspec.json.decode(raw, type=ReplayOptions)
