"""What configuration is in force in this node, of what the start said and what has been published."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from megido_capture.configuration.lastgood import Copy, LastKnownGood, Unreadable
from megido_capture.configuration.settings import CaptureSettings, option_of
from megido_capture.configuration.tightening import tightened
from megido_shared.config import PayloadRule, ProxySettings, Snapshot, decode_snapshot
from megido_shared.config_fields import FIELDS, SECRETS, given, merged
from megido_shared.errors import ConfigurationError

logger = logging.getLogger(__name__)

type Snapshots = Mapping[str, Snapshot]
"""By scope."""

GLOBAL = "global"
_COPY = ""
_GIVEN_AS = {hashed: secret for secret, hashed in SECRETS.items()}


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
    """A configuration is applied whole, rules and settings of all scopes, or not at all: then `error` says why, and
    what was in force stays in force, under whatever the refused one restricts (`tightening`). `put_in_force` is called
    with each change; the first configuration, of the copy on disk or of the start alone, is there when this has been
    made.

    `closed` is not empty while no client may be served: because what decides on access cannot be read, of the copy on
    disk or of a scope of which nothing is known, or cannot be kept here.
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
        self.rules: tuple[PayloadRule, ...] = ()
        self.taken = 0
        """Counts what came from the bus."""
        self.put_in_force: Callable[[], None] = lambda: None
        self._start = start
        self._check = check
        self._store = store
        self._offered: dict[str, Snapshot] = {}
        self._applied: dict[str, Snapshot] = {}
        self._published: set[str] = set()
        """Scopes whose snapshot came from bus or API in this life: one from disk yields to any of these."""
        self._unreadable: dict[str, str] = {}
        """By scope, and of the copy on disk: why."""
        self._awaited: set[str] = set()
        """Scopes that must have been read and applied before anybody is served."""
        self._refused = ""
        self._shut = ""
        """Why nobody may be served under what is left of a refused configuration."""
        self._unsaved = False
        self.settings = self._whole = self._settings_of({})
        """`_whole` is what the applied snapshots say; more may be restricted by a refused one."""
        self._remember()

    @property
    def version(self) -> int:
        """The highest version among the applied snapshots; 0 when there is none."""
        return max((snapshot.version for snapshot in self._applied.values()), default=0)

    @property
    def error(self) -> str:
        """All that is wrong, of every scope."""
        closed = f"nobody is served: {self.closed}" if self.closed else ""
        return "; ".join(reason for reason in (*self._unreadable.values(), self._refused, closed) if reason)

    @property
    def closed(self) -> str:
        if self._awaited:
            waiting = ", ".join(scope for scope in self.scopes if scope in self._awaited)
            return f"the configuration may restrict access and cannot be read; waiting for {waiting}"
        return self._shut

    @property
    def unsaved(self) -> bool:
        """What is in force is not on disk. While a lost copy is waited for, its ruins and its mark stay."""
        return self._unsaved and not self._awaited

    def pinned(self) -> dict[str, str]:
        return self._start.pinned()

    def take(self, scope: str, raw: bytes) -> None:
        """One scope's snapshot as the bus has it. An older one than is known is ignored."""
        self.taken += 1
        try:
            snapshot = decode_snapshot(raw)
            if snapshot.scope != scope:
                raise msgspec.ValidationError(f"it is that of {snapshot.scope!r}")
        except msgspec.DecodeError as error:
            self._unreadable[scope] = _told(
                f"the snapshot of {scope} cannot be read: {error}", self._unreadable.values()
            )
            if scope not in self._offered:
                self._awaited.add(scope)
            return
        self._unreadable.pop(scope, None)
        known = self._offered.get(scope)
        if known is not None and scope in self._published and snapshot.version < known.version:
            return
        self._published.add(scope)
        self._offer({**self._offered, scope: snapshot})

    def replace(self, snapshots: Sequence[Snapshot], *, asked_at: int | None = None) -> bool:
        """All scopes as the API has them: what it does not name is no more. False, and nothing is changed, when the
        bus said something since `taken` was `asked_at`: then this may be older, and the API is to be asked again."""
        if asked_at is not None and asked_at != self.taken:
            return False
        for scope in self.scopes:
            self._unreadable.pop(scope, None)
        self._published.update(self.scopes)
        self._offer({snapshot.scope: snapshot for snapshot in snapshots if snapshot.scope in self.scopes})
        return True

    def replace_rules(self, rules: Sequence[PayloadRule]) -> None:
        """Rules alone, of an API that knows no more; settings and all else stay."""
        known = self._offered.get(GLOBAL, Snapshot(scope=GLOBAL, version=0))
        self._offer({**self._offered, GLOBAL: msgspec.structs.replace(known, rules=tuple(rules))})

    def restart(self, start: Start) -> None:
        """Other options, while the node runs. Raises ConfigurationError and changes nothing when they cannot be."""
        before, self._start = self._start, start
        try:
            whole = self._settings_of(self._applied)
            if self._offered == self._applied:
                self._put(self._applied, whole, whole)
        except ConfigurationError:
            self._start = before
            raise
        self._whole = whole
        self._unsaved = True
        if self._offered != self._applied:
            self._offer(self._offered)

    def save(self) -> None:
        """Writes what is in force to disk; for a thread. Raises OSError."""
        if self._awaited:
            return
        self._unsaved = False
        applied, start, settings = self._applied, self._start.settings, self.settings
        offered = self._offered if self._refused else {}
        guarded = bool(self._shut) or (_access_of(settings) != _access_of(start) and any(_restricts(settings)))
        copy = Copy(applied=self._ordered(applied), refused=self._ordered(offered))
        try:
            self._store.save(copy, guarded=guarded)
        except OSError:
            self._unsaved = True
            raise

    def _offer(self, snapshots: dict[str, Snapshot]) -> None:
        self._unsaved = self._unsaved or snapshots != self._offered
        self._offered = snapshots
        if snapshots != self._applied or self._refused:
            applied, whole, rules = self._applied, self._whole, self.rules
            try:
                wanted = self._settings_of(snapshots)
                self._put(snapshots, wanted, wanted)
            except ConfigurationError as error:
                self._refuse(f"version {max(s.version for s in snapshots.values())} is refused: {error}")
                return
            except Exception as error:  # noqa: BLE001 - whatever it is: what was in force goes on
                self._applied, self._whole, self.rules = applied, whole, rules
                self._refuse(f"the configuration cannot be applied: {type(error).__name__}: {error}")
                return
        self._refused = self._shut = ""
        self._awaited -= self._published
        if not self._awaited:
            self._unreadable.pop(_COPY, None)

    def _put(self, applied: dict[str, Snapshot], whole: CaptureSettings, settings: CaptureSettings) -> None:
        self._applied, self._whole, self.settings = applied, whole, settings
        ordered = self._ordered(applied)
        self.rules = tuple({rule.id: rule for snapshot in ordered for rule in snapshot.rules}.values())
        self.put_in_force()

    def _refuse(self, reason: str) -> None:
        """What was applied stays, under what the offered one restricts."""
        self._refused = _told(reason, (self._refused,))
        restricted, self._shut = tightened(self._whole, self._start.with_published(self._said(self._offered)))
        try:
            if not self._shut and restricted != self._whole:
                restricted.checked()
                self._check(restricted)
        except ConfigurationError as error:
            self._shut = f"what the configuration restricts cannot be kept here: {error}"
        try:
            self._put(self._applied, self._whole, restricted)
        except Exception as error:  # noqa: BLE001 - fail closed
            self._shut = f"what the configuration restricts cannot be put in force: {type(error).__name__}: {error}"

    def _settings_of(self, snapshots: Snapshots) -> CaptureSettings:
        settings = self._start.with_published(self._said(snapshots)).checked()
        self._check(settings)
        return settings

    def _said(self, snapshots: Snapshots) -> ProxySettings:
        return merged(snapshot.settings for snapshot in self._ordered(snapshots))

    def _ordered(self, snapshots: Snapshots) -> list[Snapshot]:
        return [snapshots[scope] for scope in self.scopes if scope in snapshots]

    def _remember(self) -> None:
        """What was in force in the last life."""
        try:
            copy = self._store.load()
        except Unreadable as error:
            self._unreadable[_COPY] = _told(str(error), ())
            if error.guarded:
                lost = {GLOBAL, *error.scopes} if error.scopes else set(self.scopes)
                self._awaited = lost & set(self.scopes)
            return
        for snapshots in (copy.applied, copy.refused):
            if snapshots:
                self._offer({snapshot.scope: snapshot for snapshot in snapshots if snapshot.scope in self.scopes})


def _told(reason: str, known: Collection[str]) -> str:
    if reason not in known:
        logger.warning("configuration: %.300s", reason)
    return reason


def _restricts(settings: CaptureSettings) -> tuple[object, ...]:
    return settings.auth_required, settings.ip_whitelist, settings.ip_blacklist, settings.blocked_destinations


def _access_of(settings: CaptureSettings) -> tuple[object, ...]:
    return (*_restricts(settings), settings.auth_username, settings.auth_password_hash, settings.auth_token_hash)
