"""What running proxies apply: one whole snapshot a scope, published by the API, replaced as a whole."""

from typing import Literal

import msgspec
from msgspec import Struct

type InjectionType = Literal["header", "param", "cookie", "body"]


class PayloadRule(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """One payload rule: where `target_url_pattern` (RE2) is found in the URL, `payload_content` is put at
    `injection_point`. An empty `target_apps` means every application."""

    id: int
    name: str
    target_url_pattern: str
    injection_type: InjectionType
    injection_point: str
    payload_content: str
    active: bool = True
    target_apps: tuple[str, ...] = ()


class Snapshot(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """The whole configuration of a scope. `version` only rises."""

    scope: str
    version: int
    rules: tuple[PayloadRule, ...] = ()


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Snapshot)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    return _encoder.encode(snapshot)


def decode_snapshot(raw: bytes) -> Snapshot:
    """Raises msgspec.ValidationError or DecodeError on anything else than a snapshot."""
    return _decoder.decode(raw)
