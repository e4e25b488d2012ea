"""What running proxies apply: one whole snapshot a scope, published by the API, replaced as a whole."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

type InjectionType = Literal["header", "param", "cookie", "body"]


class PayloadRule(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """One payload rule: where `target_url_pattern` (RE2) is found in the URL, `payload_content` is put at
    `injection_point`. An empty `target_apps` means every application."""

    id: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    name: str
    target_url_pattern: str
    injection_type: InjectionType
    injection_point: str
    payload_content: str
    active: bool = True
    target_apps: tuple[str, ...] = ()


class ProxySettings(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """The founding document's ProxyConfiguration, and ours. None: this scope says nothing about it.

    `ip_whitelist`, `ip_blacklist`, `passthrough_hosts` and `blocked_destinations` are comma-separated, as the founding
    document's. Secrets are argon2id hashes (PHC strings): "" is none. Times in seconds, sizes in bytes.
    """

    auth_enabled: bool | None = None
    auth_username: str | None = None
    auth_password_hash: str | None = None
    auth_token_hash: str | None = None
    ip_whitelist: str | None = None
    ip_blacklist: str | None = None
    logging_enabled: bool | None = None
    log_request_body: bool | None = None
    log_response_body: bool | None = None
    log_directory: str | None = None
    connection_timeout: int | None = None
    transfer_timeout: int | None = None
    max_concurrent_clients: int | None = None
    cache_enabled: bool | None = None
    websocket_enabled: bool | None = None
    max_body_size: int | None = None
    websocket_max_message: int | None = None
    max_clients_per_address: int | None = None
    header_timeout: int | None = None
    passthrough_hosts: str | None = None
    blocked_destinations: str | None = None


class Snapshot(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """The whole configuration of a scope. `version` only rises; what is larger than any count of changes is none, and
    would be in the way of all later ones."""

    scope: str
    version: Annotated[int, Meta(ge=0, le=2**53)]
    rules: tuple[PayloadRule, ...] = ()
    settings: ProxySettings = ProxySettings()


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Snapshot)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    return _encoder.encode(snapshot)


def decode_snapshot(raw: bytes) -> Snapshot:
    """Raises msgspec.ValidationError or DecodeError on anything else than a snapshot."""
    try:
        return _decoder.decode(raw)
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None
