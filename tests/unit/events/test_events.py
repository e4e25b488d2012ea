"""The wire format: golden bytes of every type still decode, and say the same."""

from pathlib import Path

import jsonschema
import msgspec
import pytest
from scripts import reference

from megido_shared import events
from tests.unit.events.samples import COMMON, SAMPLES

GOLDEN = Path(__file__).parent / "golden"
NAMED = [pytest.param(event, id=type(event).__name__) for event in SAMPLES]


def as_plain(encoded: bytes) -> object:
    """What any MessagePack reader sees; headers that travel as a slice are pairs to it."""
    return msgspec.msgpack.decode(encoded)


def test_every_type_has_a_sample_and_a_topic() -> None:
    types = set(events.AnyEvent.__value__.__args__)
    assert {type(event) for event in SAMPLES} == types
    assert set(events.TOPIC_OF_TYPE) == types


@pytest.mark.parametrize("event", NAMED)
def test_golden_bytes_still_decode_to_the_same_event(event: events.AnyEvent) -> None:
    golden = (GOLDEN / f"{type(event).__name__}.v1.msgpack").read_bytes()
    decoded = events.decode(golden)
    assert type(decoded) is type(event)
    assert as_plain(events.encode(decoded)) == as_plain(golden) == as_plain(events.encode(event))


@pytest.mark.parametrize("event", NAMED)
def test_a_newer_writer_may_add_fields(event: events.AnyEvent) -> None:
    plain = as_plain(events.encode(event))
    assert isinstance(plain, dict)
    newer = msgspec.msgpack.encode(plain | {"field_of_a_later_version": {"a": [1]}})
    assert as_plain(events.encode(events.decode(newer))) == plain


@pytest.mark.parametrize("event", NAMED)
def test_the_sample_sets_every_field(event: events.AnyEvent) -> None:
    """Otherwise the golden bytes would not cover it: defaults are left out of the encoding."""
    plain = as_plain(events.encode(event))
    assert isinstance(plain, dict)
    assert set(plain) - {"type"} == {field.encode_name for field in msgspec.structs.fields(event)}


@pytest.mark.parametrize("event", NAMED)
def test_the_schema_describes_what_is_sent(event: events.AnyEvent) -> None:
    schema = reference.event_schemas()
    plain = msgspec.json.decode(msgspec.json.encode(as_plain(events.encode(event))))  # bin → base64
    jsonschema.Draft202012Validator(schema).validate(plain)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(plain | {"event_id": 5})


def test_the_reference_has_every_command() -> None:
    page = (reference.FOLDER / "commands.md").read_text()
    titles = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert titles == list(reference.commands())
    assert {
        "megido up",
        "megido capture",
        "megido accounting",
        "megido dead-letters redrive",
        "megido rules list",
    } < set(titles)


def test_the_reference_is_fresh() -> None:
    assert reference.stale() == [], "run: .venv/bin/python scripts/reference.py"


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(b"A", b"1"), (b"a", b"2"), (b"A", b"1")],
        [(b"\x00\xff", bytes(range(256)))],
        [(b"h%d" % n, b"v" * 100) for n in range(1000)],
    ],
)
def test_headers_keep_order_case_duplicates_and_bytes(pairs: list[tuple[bytes, bytes]]) -> None:
    packed = events.pack_headers(pairs)
    assert events.unpack_headers(packed) == pairs
    event = events.FlowStarted(
        **COMMON,
        flow_id=b"f" * 16,
        request=events.Request(method=b"GET", scheme="http", host="h", port=1, target=b"/", headers=packed),
    )
    decoded = events.decode(events.encode(event))
    assert isinstance(decoded, events.FlowStarted)
    assert bytes(decoded.request.headers) == bytes(packed)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", ""),
        (b"\xc1", ""),
        (msgspec.msgpack.encode([1]), ""),
        (msgspec.msgpack.encode({"type": "FromTheFuture", "a": 1}), "FromTheFuture"),
    ],
)
def test_the_type_of_bytes_that_we_cannot_decode(raw: bytes, expected: str) -> None:
    assert events.type_name(raw) == expected
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        events.decode(raw)


def test_a_key_is_never_a_host_or_a_client() -> None:
    for event in SAMPLES:
        key = events.key_of(event)
        assert key
        assert b"192.0.2.1" not in key
        assert b"example.com" not in key


def test_cloud_event_attributes() -> None:
    headers = events.cloud_event_headers(SAMPLES[0])
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_type"] == b"megido.FlowStarted.v1"
    assert headers["ce_id"] == SAMPLES[0].event_id.hex().encode()
