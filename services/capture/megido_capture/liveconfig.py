"""What configuration is in force in this node, of what the start said and what has been published."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from megido_capture.lastgood import LastKnownGood, Unreadable
from megido_capture.settings import CaptureSettings, option_of
from megido_shared.config import PayloadRule, ProxySettings, Snapshot
from megido_shared.config_fields import FIELDS, SECRETS, given, merged
from megido_shared.errors import ConfigurationError

logger = logging.getLogger(__name__)

type Snapshots = Mapping[str, Snapshot]
"""By scope."""

_GIVEN_AS = {hashed: secret for secret, hashed in SECRETS.items()}
CLOSED = "the last configuration asked for access control and cannot be read; waiting for the next one"


@dataclass(frozen=True, slots=True)
class Start:
    """What this process was started with. `given` are the options that a flag, `--set` or a variable named: these
    win over whatever is published."""

    settings: CaptureSettings
    given: frozenset[str] = field(default_factory=frozenset)

    def with_published(self, said: ProxySettings) -> CaptureSettings:
        """The settings that follow. Raises nothing: they are not checked."""
        values = {option_of(name): value for name, value in given(said).items() if name != "log_directory"}
        return replace(
            self.settings,
            **{option: value for option, value in values.items() if _GIVEN_AS.get(option, option) not in self.given},
        )

    def pinned(self) -> dict[str, str]:
        """Fields of the configuration that publishing does not change here, and what they are; never a secret."""
        shown = {}
        for name in FIELDS:
            option = option_of(name)
            if option in self.given:
                shown[name] = "set" if name in SECRETS else _shown(getattr(self.settings, option))
        if self.settings.allow_open_proxy:
            shown["allow_open_proxy"] = "true"
        return shown


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class LiveConfiguration:
    """A configuration is applied whole, rules and settings of all scopes, or not at all: then what was in force stays
    in force and `error` says why. `put_in_force` is called with each that is applied; the first, of the copy on disk
    or of the start alone, is there when this has been made.

    `closed` is not empty while no client may be served, because the copy on disk is damaged and the configuration
    that it held decided on access.
    """

    def __init__(
        self,
        start: Start,
        scopes: Sequence[str],
        *,
        check: Callable[[CaptureSettings], None],
        store: LastKnownGood,
    ) -> None:
        """`scopes`: the most general first. `check` raises ConfigurationError on settings that this node cannot run
        with. Raises it too when the start's own are such."""
        self.scopes = tuple(scopes)
        self.settings = start.settings
        self.rules: tuple[PayloadRule, ...] = ()
        self.error = ""
        self.closed = ""
        self.unsaved = False
        """What is in force is not on disk."""
        self.put_in_force: Callable[[], None] = lambda: None
        self._start = start
        self._check = check
        self._store = store
        self._offered: dict[str, Snapshot] = {}
        self._applied: dict[str, Snapshot] = {}
        self._published: set[str] = set()
        """Scopes whose snapshot came from bus or API in this life: one from disk yields to any of these."""
        self._settings_of({})
        self._remember()

    @property
    def version(self) -> int:
        """The highest version among the applied snapshots; 0 when there is none."""
        return max((snapshot.version for snapshot in self._applied.values()), default=0)

    def pinned(self) -> dict[str, str]:
        return self._start.pinned()

    def take(self, scope: str, raw: bytes) -> None:
        """One scope's snapshot as the bus has it. An older one than is known is ignored."""
        try:
            snapshot = msgspec.json.decode(raw, type=Snapshot)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self._refuse(f"the snapshot of {scope} cannot be read: {error}")
            return
        known = self._offered.get(scope)
        if known is not None and scope in self._published and snapshot.version < known.version:
            return
        self._published.add(scope)
        self._offer({**self._offered, scope: snapshot})

    def replace(self, snapshots: Sequence[Snapshot]) -> None:
        """All scopes as the API has them: what it does not name is no more."""
        self._published.update(self.scopes)
        self._offer({snapshot.scope: snapshot for snapshot in snapshots if snapshot.scope in self.scopes})

    def restart(self, start: Start) -> None:
        """Other options, while the node runs. Raises ConfigurationError and changes nothing when they cannot be."""
        before, self._start = self._start, start
        try:
            self._put(self._applied, self._settings_of(self._applied))
        except ConfigurationError:
            self._start = before
            raise
        self.unsaved = True
        if self._offered != self._applied:
            self._offer(self._offered)

    def save(self) -> None:
        """Writes what is in force to disk; for a thread. Raises OSError."""
        self.unsaved = False
        applied, start, settings = self._applied, self._start.settings, self.settings
        guarded = _access_of(settings) != _access_of(start) and any(_access_of(settings)[:3])
        try:
            self._store.save([applied[scope] for scope in self.scopes if scope in applied], guarded=guarded)
        except OSError:
            self.unsaved = True
            raise

    def _offer(self, snapshots: dict[str, Snapshot]) -> None:
        self._offered = snapshots
        if snapshots == self._applied and not self.error:
            return
        applied, settings = self._applied, self.settings
        try:
            self._put(snapshots, self._settings_of(snapshots))
        except ConfigurationError as error:
            self._refuse(f"version {max(s.version for s in snapshots.values())} is refused: {error}")
        except Exception as error:  # noqa: BLE001 - whatever it is: what was in force goes on
            self._put(applied, settings)
            self._refuse(f"the configuration cannot be applied: {type(error).__name__}: {error}")
        else:
            self.error = self.closed = ""

    def _put(self, snapshots: dict[str, Snapshot], settings: CaptureSettings) -> None:
        ordered = [snapshots[scope] for scope in self.scopes if scope in snapshots]
        self.unsaved = self.unsaved or snapshots != self._applied
        self._applied = snapshots
        self.settings = settings
        self.rules = tuple({rule.id: rule for snapshot in ordered for rule in snapshot.rules}.values())
        self.put_in_force()

    def _settings_of(self, snapshots: Snapshots) -> CaptureSettings:
        said = merged(snapshots[scope].settings for scope in self.scopes if scope in snapshots)
        settings = self._start.with_published(said).checked()
        self._check(settings)
        return settings

    def _refuse(self, reason: str) -> None:
        if reason != self.error:
            logger.warning("configuration: %.300s", reason)
        self.error = reason

    def _remember(self) -> None:
        """What was in force in the last life."""
        try:
            snapshots = self._store.load()
        except Unreadable as error:
            self._refuse(str(error))
            if error.guarded:
                self.closed = CLOSED
            return
        self._offer({snapshot.scope: snapshot for snapshot in snapshots if snapshot.scope in self.scopes})


def _access_of(settings: CaptureSettings) -> tuple[object, ...]:
    return (
        settings.auth_required,
        settings.ip_whitelist,
        settings.ip_blacklist,
        settings.auth_username,
        settings.auth_password_hash,
        settings.auth_token_hash,
    )
