"""Which configuration is in force, of what the start said and what was published."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megido_capture.configuration.lastgood import Copy, LastKnownGood, Unreadable
from megido_capture.configuration.live import LiveConfiguration, Start
from megido_capture.configuration.settings import CONFIGURED, NAMES, CaptureSettings, option_of
from megido_shared.config import PayloadRule, ProxySettings, Snapshot, encode_snapshot
from megido_shared.config_fields import FIELDS, SECRETS
from megido_shared.errors import ConfigurationError

SCOPES = ("global", "app:browser", "node:capture-0")


def snapshot(version: int, scope: str = "global", rules: tuple[PayloadRule, ...] = (), **settings: Any) -> Snapshot:
    return Snapshot(scope=scope, version=version, rules=rules, settings=ProxySettings(**settings))


def take(live: LiveConfiguration, *snapshots: Snapshot) -> None:
    for one in snapshots:
        live.take(one.scope, encode_snapshot(one))


class Parts:
    def __init__(self, tmp_path: Path, *given: str, **settings: Any) -> None:
        self.start = Start(CaptureSettings(**settings), frozenset(given))
        self.store = LastKnownGood(tmp_path / "last-known-good", "capture-0")
        self.needs_auth = False
        self.live = LiveConfiguration(self.start, SCOPES, check=self.check, store=self.store)

    def check(self, settings: CaptureSettings) -> None:
        """As of a listener that others reach."""
        if self.needs_auth and not settings.auth_required:
            raise ConfigurationError("refusing to listen without authentication")


def test_every_field_leads_to_an_option_with_the_same_default() -> None:
    settings = CaptureSettings()
    for name in CONFIGURED:
        assert getattr(settings, option_of(name)) == FIELDS[name].default, name
    assert {option_of(name) for name in FIELDS} - set(NAMES) == {"log_directory"}
    assert set(FIELDS) - set(SECRETS) | set(SECRETS.values()) == set(ProxySettings.__struct_fields__)


def test_the_start_over_node_over_application_over_global_over_default(tmp_path: Path) -> None:
    live = Parts(tmp_path, "header_timeout", header_timeout=1).live
    take(
        live,
        snapshot(1, header_timeout=2, transfer_timeout=2, connection_timeout=2, max_body_size=2),
        snapshot(2, "app:browser", transfer_timeout=3, connection_timeout=3),
        snapshot(3, "node:capture-0", connection_timeout=4),
    )
    found = live.settings
    assert (found.header_timeout, found.connection_timeout, found.transfer_timeout, found.max_body_size) == (1, 4, 3, 2)
    assert found.websocket_max_message == CaptureSettings().websocket_max_message
    assert (live.version, live.error, live.pinned()) == (3, "", {"header_timeout": "1"})


def test_a_given_secret_pins_its_hash_and_is_never_shown(tmp_path: Path) -> None:
    live = Parts(tmp_path, "auth_password", auth_password="p4ss").live
    take(live, snapshot(1, auth_password_hash="published", auth_token_hash="published", auth_enabled=True))
    assert (live.settings.auth_password_hash, live.settings.auth_token_hash) == ("", "published")
    assert live.settings.auth_required and live.pinned() == {"auth_password": "set"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"auth_enabled": False}, "without authentication"),
        ({"ip_whitelist": "10.0.0.0/33"}, "ip_whitelist"),
        ({"connection_timeout": 0}, "connection_timeout"),
    ],
)
def test_what_is_refused_leaves_all_as_it_was(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    parts = Parts(tmp_path)
    live = parts.live
    take(live, snapshot(1, auth_enabled=True, auth_token_hash="h", max_body_size=5))
    parts.needs_auth = True
    in_force = live.settings
    take(live, snapshot(2, **({"auth_enabled": True, "auth_token_hash": "h", "max_body_size": 6} | settings)))
    assert live.settings == in_force and live.version == 1
    assert "version 2 is refused" in live.error and says in live.error
    take(live, snapshot(3, auth_enabled=True, auth_token_hash="h", max_body_size=7))
    assert (live.settings.max_body_size, live.version, live.error) == (7, 3, "")


def test_what_cannot_be_read_or_put_in_force_leaves_all_as_it_was(tmp_path: Path) -> None:
    live = Parts(tmp_path).live
    take(live, snapshot(1, max_body_size=5))
    live.take("global", b'{"scope":"global","version":"x"}')
    assert "cannot be read" in live.error and live.version == 1

    def fails() -> None:
        if live.settings.max_body_size == 6:
            raise RuntimeError("defect")

    live.put_in_force = fails
    take(live, snapshot(2, max_body_size=6))
    assert live.settings.max_body_size == 5 and "defect" in live.error


def test_an_older_snapshot_is_ignored_but_for_that_of_a_new_bus(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    take(parts.live, snapshot(7, max_body_size=7), snapshot(6, max_body_size=6))
    assert parts.live.settings.max_body_size == 7
    parts.live.save()
    live = Parts(tmp_path).live
    assert (live.settings.max_body_size, live.version) == (7, 7)
    take(live, snapshot(1, max_body_size=1))
    assert (live.settings.max_body_size, live.version) == (1, 1)


def test_the_api_says_all_that_there_is(tmp_path: Path) -> None:
    live = Parts(tmp_path).live
    live.replace([snapshot(5, max_body_size=5), snapshot(6, "app:browser", connection_timeout=6)])
    live.replace([snapshot(4, max_body_size=4), snapshot(9, "app:other", max_body_size=9)])
    assert (live.settings.max_body_size, live.settings.connection_timeout, live.version) == (4, 30, 4)


def test_other_options_take_effect_under_the_configuration_or_are_refused(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    take(parts.live, snapshot(1, auth_enabled=True, auth_token_hash="h", max_body_size=5))
    parts.live.restart(Start(CaptureSettings(max_body_size=9, cache_ttl=3), frozenset({"max_body_size"})))
    assert (parts.live.settings.max_body_size, parts.live.settings.cache_ttl) == (9, 3)
    parts.needs_auth = True
    with pytest.raises(ConfigurationError):
        parts.live.restart(Start(CaptureSettings(auth_required=False), frozenset({"auth_required"})))
    assert parts.live.settings.auth_required and parts.live.settings.max_body_size == 9


def test_a_refused_configuration_is_tried_again_under_other_options(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    take(parts.live, snapshot(1, auth_enabled=True))
    assert parts.live.error
    parts.live.restart(Start(CaptureSettings(auth_token="t"), frozenset({"auth_token"})))
    assert parts.live.settings.auth_required and not parts.live.error


def test_rules_of_all_scopes_each_once(tmp_path: Path) -> None:
    live = Parts(tmp_path).live

    def rule(number: int) -> PayloadRule:
        return PayloadRule(
            id=number,
            name="r",
            target_url_pattern=".",
            injection_type="header",
            injection_point="X",
            payload_content="",
        )

    take(live, snapshot(1, rules=(rule(1), rule(2))), snapshot(2, "app:browser", rules=(rule(2), rule(3))))
    assert [found.id for found in live.rules] == [1, 2, 3]


def test_the_copy_is_private_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    assert parts.store.load() == Copy()
    take(parts.live, snapshot(1, max_body_size=5))
    parts.live.save()
    copy = tmp_path / "last-known-good" / "capture-0"
    assert copy.stat().st_mode & 0o777 == 0o600 and not copy.with_suffix(".guarded").exists()
    damaged = copy.read_bytes()[:-1]
    copy.write_bytes(damaged)
    with pytest.raises(Unreadable) as caught:
        parts.store.load()
    assert not caught.value.guarded
    copy.write_bytes(damaged)
    live = Parts(tmp_path).live
    assert (live.closed, live.settings) == ("", CaptureSettings()) and "cannot be read" in live.error


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize(
    "settings",
    [{"ip_whitelist": "10.0.0.0/8"}, {"ip_blacklist": "10.0.0.0/8"}, {"auth_enabled": True, "auth_token_hash": "h"}],
)
def test_nobody_is_served_when_the_copy_decided_on_access_and_is_damaged(
    tmp_path: Path, settings: dict[str, Any], damage: str
) -> None:
    parts = Parts(tmp_path)
    take(parts.live, snapshot(1, **settings))
    parts.live.save()
    copy = tmp_path / "last-known-good" / "capture-0"
    copy.write_bytes(b"") if damage == "cut" else copy.unlink()
    live = Parts(tmp_path).live
    assert live.closed and live.error
    take(live, snapshot(2, connection_timeout=0))
    assert live.closed, "what is refused opens nothing"
    take(live, snapshot(3, **settings))
    assert not live.closed and not live.error


def test_what_the_start_itself_decides_on_access_needs_no_copy(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "auth_required", "auth_token", auth_required=True, auth_token="t")
    take(parts.live, snapshot(1, max_body_size=5))
    parts.live.save()
    (tmp_path / "last-known-good" / "capture-0").write_bytes(b"")
    live = Parts(tmp_path, "auth_required", "auth_token", auth_required=True, auth_token="t").live
    assert not live.closed and live.settings.auth_required


def lost(tmp_path: Path, *snapshots: Snapshot) -> LiveConfiguration:
    """Of a node whose copy of these was damaged."""
    parts = Parts(tmp_path)
    take(parts.live, *snapshots)
    parts.live.save()
    (tmp_path / "last-known-good" / "capture-0").write_bytes(b"")
    return Parts(tmp_path).live


def test_one_scope_does_not_open_what_others_may_have_closed(tmp_path: Path) -> None:
    live = lost(tmp_path, snapshot(1, auth_enabled=True, auth_token_hash="h"), snapshot(2, "app:browser"))
    take(live, snapshot(2, "app:browser", max_body_size=5))
    assert live.closed and "global" in live.closed and "is gone" not in live.error and "cannot be read" in live.error
    assert not live.unsaved
    live.save()
    assert Parts(tmp_path).live.closed, "the ruins are kept until all is known again"
    take(live, snapshot(1, auth_enabled=True, auth_token_hash="h"))
    assert (live.closed, live.error, live.settings.auth_required) == ("", "", True)
    assert live.unsaved
    live.save()
    assert Parts(tmp_path).live.settings == live.settings


def test_each_scope_of_a_lost_copy_must_come_back(tmp_path: Path) -> None:
    live = lost(tmp_path, snapshot(1), snapshot(2, "app:browser", ip_blacklist="10.0.0.0/8"))
    take(live, snapshot(1))
    assert "waiting for app:browser" in live.closed
    live.replace([snapshot(3)])
    assert not live.closed and not live.error, "the API says all that there is"


def test_a_mark_that_cannot_be_read_waits_for_every_scope(tmp_path: Path) -> None:
    lost(tmp_path, snapshot(1, ip_blacklist="10.0.0.0/8"))
    (tmp_path / "last-known-good" / "capture-0.guarded").write_bytes(b"")
    live = Parts(tmp_path).live
    take(live, snapshot(1), snapshot(2, "node:capture-0"))
    assert live.closed
    take(live, snapshot(3, "app:browser"))
    assert not live.closed


def test_blocked_destinations_are_guarded(tmp_path: Path) -> None:
    assert lost(tmp_path, snapshot(1, blocked_destinations="169.254.0.0/16")).closed


def test_a_scope_that_could_never_be_read_closes_and_its_error_outlives_those_of_others(tmp_path: Path) -> None:
    live = Parts(tmp_path).live
    live.take("global", b"\0")
    take(live, snapshot(1, "app:browser", max_body_size=5))
    assert live.closed and "the snapshot of global cannot be read" in live.error
    take(live, snapshot(2))
    assert (live.closed, live.error) == ("", "")
    live.take("global", b"\0")
    take(live, snapshot(3, "app:browser", max_body_size=6))
    assert (live.closed, live.settings.max_body_size) == ("", 6), "what is known of it stays in force"
    assert "the snapshot of global" in live.error
    live.take("node:capture-0", encode_snapshot(snapshot(9)))
    assert live.closed, "the snapshot of another scope is none"


def test_a_refused_configuration_restricts_all_the_same(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    take(parts.live, snapshot(1, auth_token_hash="h", ip_whitelist="10.0.0.0/8", blocked_destinations="a.example"))
    take(parts.live, snapshot(2, "app:browser", connection_timeout=0))
    assert "version 2 is refused" in parts.live.error and not parts.live.closed
    take(
        parts.live,
        snapshot(
            3,
            auth_enabled=True,
            auth_token_hash="new",
            ip_whitelist="10.1.0.0/16, 192.168.0.0/16",
            ip_blacklist="10.1.1.1",
            blocked_destinations="b.example",
            max_body_size=5,
        ),
    )

    def in_force(live: LiveConfiguration) -> tuple[object, ...]:
        found = live.settings
        assert not live.closed and live.version == 1 and "version 3 is refused" in live.error
        return (
            found.auth_required,
            found.auth_token_hash,
            found.ip_whitelist,
            found.ip_blacklist,
            found.blocked_destinations,
            found.max_body_size,
        )

    expected = (True, "new", "10.1.0.0/16", "10.1.1.1", "a.example, b.example", CaptureSettings().max_body_size)
    assert in_force(parts.live) == expected
    parts.live.save()
    assert in_force(Parts(tmp_path).live) == expected, "over a restart too"
    take(parts.live, snapshot(4, "app:browser"))
    assert (parts.live.error, parts.live.settings.max_body_size, parts.live.settings.ip_whitelist) == (
        "",
        5,
        "10.1.0.0/16, 192.168.0.0/16",
    )


def test_nobody_is_served_when_credentials_are_asked_for_and_none_are_left(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    take(parts.live, snapshot(1, auth_enabled=True, auth_token_hash="h"))
    take(parts.live, snapshot(2, "app:browser", auth_enabled=False, auth_token_hash=""))
    assert not parts.live.closed and not parts.live.settings.auth_required
    take(parts.live, snapshot(3, "node:capture-0", auth_enabled=True))
    assert "nothing to compare with" in parts.live.error and parts.live.closed and parts.live.settings.auth_required
    take(parts.live, snapshot(4, auth_enabled=True, auth_token_hash="h", ip_blacklist="10.0.0.0/8"))
    assert parts.live.settings.ip_blacklist == "10.0.0.0/8"
    parts.live.save()
    assert Parts(tmp_path).live.closed
    take(parts.live, snapshot(5, "app:browser"))
    assert (parts.live.closed, parts.live.error, parts.live.settings.auth_token_hash) == ("", "", "h")


def test_nobody_is_served_when_no_address_is_in_both_whitelists(tmp_path: Path) -> None:
    live = Parts(tmp_path).live
    take(live, snapshot(1, ip_whitelist="10.0.0.0/8"), snapshot(2, ip_whitelist="fe80::/10", connection_timeout=0))
    assert "ip_whitelist" in live.closed


def test_an_answer_older_than_the_bus_is_not_taken(tmp_path: Path) -> None:
    live = Parts(tmp_path).live
    asked_at = live.taken
    take(live, snapshot(8, max_body_size=8))
    assert not live.replace([snapshot(7, max_body_size=7)], asked_at=asked_at)
    assert (live.version, live.settings.max_body_size) == (8, 8)
    assert live.replace([snapshot(7, max_body_size=7)], asked_at=live.taken)
    assert live.version == 7, "asked after that, the API is the truth"


def test_rules_of_an_older_api_leave_settings_in_force(tmp_path: Path) -> None:
    live = Parts(tmp_path).live
    live.replace([snapshot(3, auth_enabled=True, auth_token_hash="h"), snapshot(4, "app:browser", max_body_size=4)])
    in_force = live.settings
    rule = PayloadRule(
        id=1, name="r", target_url_pattern=".", injection_type="header", injection_point="X", payload_content=""
    )
    live.replace_rules([rule])
    assert (live.settings, live.rules, live.version) == (in_force, (rule,), 4)


def a_copy(tmp_path: Path, content: bytes, *, guarded: bool) -> Path:
    """On the disk of a node, as somebody else left it."""
    copy = tmp_path / "last-known-good" / "capture-0"
    copy.parent.mkdir()
    copy.write_bytes(content)
    if guarded:
        copy.with_name("capture-0.guarded").write_bytes(b'["global"]')
    return copy


def under_checksum(raw: bytes, form: str = "") -> bytes:
    return f"{hashlib.sha256(raw).hexdigest()}{form}\n".encode() + raw


SAYS = b'[{"scope":"global","version":7,"settings":{"max_body_size":7,"ip_blacklist":"10.0.0.0/8"}}]'


@pytest.mark.parametrize("raw", [SAYS, b'{"applied":' + SAYS + b"}"])
@pytest.mark.parametrize("form", ["", " 2"])
def test_a_copy_of_an_older_version_is_read(tmp_path: Path, raw: bytes, form: str) -> None:
    a_copy(tmp_path, under_checksum(raw, form), guarded=True)
    live = Parts(tmp_path).live
    assert (live.version, live.settings.max_body_size, live.settings.ip_blacklist) == (7, 7, "10.0.0.0/8")
    assert (live.closed, live.error) == ("", "")


UNKNOWN = {
    "newer": under_checksum(SAYS, " 3"),
    "other fields": under_checksum(b'{"scopes":' + SAYS + b"}", " 2"),
    "no checksum": SAYS,
    "empty": b"",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("content", UNKNOWN.values(), ids=UNKNOWN)
def test_a_copy_in_an_unknown_form_is_set_aside_and_opens_nothing(
    tmp_path: Path, content: bytes, guarded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    copy = a_copy(tmp_path, content, guarded=guarded)
    for _ in range(2):  # the second start finds it gone
        live = Parts(tmp_path).live
        assert bool(live.closed) is guarded and live.version == 0
    assert not copy.exists() and copy.with_name("capture-0.unreadable").read_bytes() == content
    assert "capture-0.unreadable" in caplog.text
    take(live, snapshot(1, ip_blacklist="10.0.0.0/8"))
    assert (live.closed, live.error) == ("", "")
    live.save()
    assert Parts(tmp_path).live.settings.ip_blacklist == "10.0.0.0/8"


def deeply_nested(scope: str) -> bytes:
    return b'{"scope":"%s","version":1,"x":%s%s}' % (scope.encode(), b"[" * 100_000, b"]" * 100_000)


@pytest.mark.parametrize(
    "raw",
    [
        deeply_nested("global"),
        b'{"scope":"global","version":99999999999999999999}',
        b'{"scope":"global","version":-1}',
        b'{"scope":"global","version":1e400}',
        b'{"scope":"global","version":2,"settings":{"ip_blacklist":"\\ud800"}}',
        b'{"scope":"global","version":2,"rules":[{"id":9223372036854775808,"name":"","target_url_pattern":"",'
        b'"injection_type":"header","injection_point":"X","payload_content":""}]}',
        b"\xff",
        b"",
    ],
    ids=["nested", "huge version", "negative version", "no number", "surrogate", "huge rule", "binary", "empty"],
)
def test_hostile_values_are_told_and_change_nothing(tmp_path: Path, raw: bytes) -> None:
    """Taken, a version that no change can exceed would be the last one; what raises would stop the watching."""
    live = Parts(tmp_path).live
    take(live, snapshot(1, max_body_size=5))
    live.take("global", raw)
    assert "the snapshot of global cannot be read" in live.error
    assert (live.version, live.settings.max_body_size, live.closed) == (1, 5, "")
    take(live, snapshot(2, max_body_size=6))
    assert (live.version, live.error, live.settings.max_body_size) == (2, "", 6)


def test_a_copy_that_is_nested_too_deeply_is_set_aside(tmp_path: Path) -> None:
    raw = b'{"applied":[' + deeply_nested("global") + b"]}"
    copy = a_copy(tmp_path, under_checksum(raw, " 2"), guarded=True)
    assert Parts(tmp_path).live.closed and not copy.exists()
