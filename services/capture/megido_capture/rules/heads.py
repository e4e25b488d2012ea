"""Payload rules: which apply to a request, and what becomes of those that do not."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from mitmproxy import http

from megido_capture.counters import Counters, contained
from megido_capture.recording.flows import url_of
from megido_capture.recording.state import Registry
from megido_capture.rules.injection import BODY_CAP, inject, kind_of
from megido_shared.config import PayloadRule
from megido_shared.rulelimits import MAX_ACTIVE, SEARCHED_ALWAYS, Pattern, compile_pattern, unusable_name

logger = logging.getLogger(__name__)

SLICE = 0.001
"""Seconds of compiling in one turn of the event loop, and a pattern more. Not in a thread: RE2 holds the interpreter's
lock while it compiles."""

_HOOKS = frozenset(("requestheaders", "request"))
_ORDER = ("param", "header", "cookie")
"""In which rules for a head are applied: a cookie goes into what a rule for the header `Cookie` put there."""


class CompiledRule:
    __slots__ = ("longest", "matches", "rule")

    def __init__(self, rule: PayloadRule, pattern: Pattern) -> None:
        self.rule = rule
        self.matches, self.longest = pattern


class RuleSet:
    """The rules that this node applies, replaced as a whole. A rule that fails is counted and harms nothing else."""

    def __init__(self, counters: Counters, source_app: str) -> None:
        self._counters = counters
        self._source_app = source_app
        self._searches: dict[str, Pattern | Exception] = {}
        """What is compiled, by pattern: a change of one rule compiles one."""
        self._heads: tuple[CompiledRule, ...] = ()
        self._bodies: tuple[CompiledRule, ...] = ()
        self._loading: asyncio.Task[None] | None = None
        self.replaced: Callable[[], None] = lambda: None
        """Called when other rules are in force: hooks may have something to do that had nothing."""

    def __bool__(self) -> bool:
        return bool(self._heads or self._bodies)

    def load(self, rules: Sequence[PayloadRule], done: Callable[[], None]) -> None:
        """Puts `rules` in force: at once when every pattern is known, else within a second or two, while the event
        loop serves in between and the rules that were go on. Then calls `done`. A later call takes the place of one
        that is not done yet."""
        self.stop_loading()
        if self._unknown(rules):
            self._loading = asyncio.get_running_loop().create_task(self._load(rules, done))
        else:
            self.replace(rules)
            done()

    def stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None

    async def _load(self, rules: Sequence[PayloadRule], done: Callable[[], None]) -> None:
        await asyncio.sleep(0)
        begun = time.perf_counter()
        for pattern in self._unknown(rules):
            self._search_of(pattern)
            if time.perf_counter() - begun > SLICE:
                await asyncio.sleep(0)
                begun = time.perf_counter()
        self._loading = None
        self.replace(rules)
        done()

    def _unknown(self, rules: Iterable[PayloadRule]) -> list[str]:
        usable = [rule for rule in rules if self._applies(rule)][:MAX_ACTIVE]
        return list({rule.target_url_pattern: None for rule in usable if rule.target_url_pattern not in self._searches})

    def replace(self, rules: Iterable[PayloadRule]) -> None:
        """At once. What no rule of these uses is not kept compiled."""
        usable = [rule for rule in rules if self._applies(rule)]
        compiled = [found for rule in usable[:MAX_ACTIVE] if (found := self._compile(rule))]
        for rule in usable[MAX_ACTIVE:]:
            self._failed(rule, ValueError(f"there are more than {MAX_ACTIVE} active rules"))
        used = {rule.target_url_pattern for rule in usable[:MAX_ACTIVE]}
        self._searches = {pattern: found for pattern, found in self._searches.items() if pattern in used}
        heads = [item for item in compiled if item.rule.injection_type != "body"]
        self._heads = tuple(sorted(heads, key=lambda item: _ORDER.index(item.rule.injection_type)))
        self._bodies = tuple(item for item in compiled if item.rule.injection_type == "body")
        self.replaced()

    def wants_body(self, request: http.Request) -> bool:
        """Whether a rule changes this request's body: then all of it has to be there before it goes on."""
        return bool(self._bodies) and kind_of(request) != "" and bool(self._matching(self._bodies, request))

    def must_buffer(self, request: http.Request, length: int | None) -> bool:
        """Whether a body that would be streamed is to be read whole: not when its `length` is unknown (it is changed
        on its way) or above the cap."""
        if length is None or not self.wants_body(request):
            return False
        if length > BODY_CAP:
            self.skip_body(request)
            return False
        return True

    def skip_body(self, request: http.Request) -> None:
        """The body is too large: the rules that wanted it count that."""
        for item in self._matching(self._bodies, request):
            self._counters[f"rule_skipped:{item.rule.id}"] += 1

    def apply_head(self, request: http.Request) -> tuple[int, ...]:
        """Headers, parameters and cookies. Returns the ids of the rules that changed the request."""
        return self._apply(self._heads, request)

    def apply_body(self, request: http.Request) -> tuple[int, ...]:
        """To a request that is there whole. One whose body has no fields is no failure of a rule."""
        if not self._bodies or not kind_of(request):
            return ()
        if len(request.raw_content or b"") > BODY_CAP:
            self.skip_body(request)
            return ()
        return self._apply(self._bodies, request)

    def apply_to(self, request: http.Request, body: bytes) -> tuple[bytes, tuple[int, ...]]:
        """The body that a request is to have whose own is not kept, and the rules that changed it."""
        whole = request.copy()  # its headers are on their way already
        whole.raw_content = body
        applied = self._apply(self._bodies, whole)
        return whole.raw_content or b"", applied

    def _apply(self, rules: Sequence[CompiledRule], request: http.Request) -> tuple[int, ...]:
        if not rules:
            return ()
        self._skip_long(rules, request)
        found = [item.rule for item in self._matching(rules, request)]
        applied: list[int] = []
        for _, group in groupby(found, key=lambda rule: rule.injection_type):
            same = list(group)
            failures = inject(same, request)
            for rule, error in failures:
                self._failed(rule, error)
            failed = {rule.id for rule, _ in failures}
            applied += [rule.id for rule in same if rule.id not in failed]
        for number in applied:
            self._counters[f"rule_hits:{number}"] += 1
        return tuple(applied)

    def _matching(self, rules: Sequence[CompiledRule], request: http.Request) -> list[CompiledRule]:
        url = url_of(request)
        return [item for item in rules if len(url) <= item.longest and item.matches(url)]

    def _skip_long(self, rules: Sequence[CompiledRule], request: http.Request) -> None:
        """The URL is too long for the pattern: everybody would wait for it."""
        if len(request.data.path) > SEARCHED_ALWAYS // 2:
            length = len(url_of(request))
            for item in rules:
                if length > item.longest:
                    self._counters[f"rule_skipped:{item.rule.id}"] += 1

    def _applies(self, rule: PayloadRule) -> bool:
        return rule.active and (not rule.target_apps or self._source_app in rule.target_apps)

    def _compile(self, rule: PayloadRule) -> CompiledRule | None:
        search = self._search_of(rule.target_url_pattern)
        if isinstance(search, Exception):
            self._failed(rule, search)
        elif why := unusable_name(rule.injection_type, rule.injection_point):
            self._failed(rule, ValueError(f"{rule.injection_point!r} {why}"))
        else:
            return CompiledRule(rule, search)
        return None

    def _search_of(self, pattern: str) -> Pattern | Exception:
        found = self._searches.get(pattern)
        if found is None:
            try:
                found = compile_pattern(pattern)
            except Exception as error:  # noqa: BLE001 - whatever a pattern does, the others come into force
                found = error.with_traceback(None)
            self._searches[pattern] = found
        return found

    def _failed(self, rule: PayloadRule, error: Exception) -> None:
        name = f"rule_errors:{rule.id}"
        self._counters[name] += 1
        if self._counters[name] == 1:
            logger.warning("payload rule %s (%s) cannot be applied: %.200s", rule.id, rule.name, error)


class Rules:
    """The addon that applies them."""

    name = "megido-rules"

    def __init__(self, rules: RuleSet, registry: Registry, counters: Counters) -> None:
        self.rules = rules
        self.counters = counters
        self._registry = registry

    @property
    def idle_hooks(self) -> frozenset[str]:
        """See `Dispatcher`."""
        return frozenset() if self.rules else _HOOKS

    @contained
    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """Before anything is sent: a streamed request's head goes upstream right after this."""
        state = self._registry.flows.get(flow.id)
        if state is not None and self.rules:
            state.rules = self.rules.apply_head(flow.request)

    @contained
    def request(self, flow: http.HTTPFlow) -> None:
        state = self._registry.flows.get(flow.id)
        if state is not None and self.rules and state.request_tee is None:
            state.rules += self.rules.apply_body(flow.request)
