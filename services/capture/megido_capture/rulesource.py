"""Where the payload rules come from: the bus's configuration snapshots, or the API, polled."""

import asyncio
import logging
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from urllib.parse import urlencode

import httpx
import msgspec

from megido_shared.bus.base import Bus
from megido_shared.config import PayloadRule, Snapshot, decode_snapshot

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a poll, in the host's own log

RETRY_AFTER = 2.0
POLL_TIMEOUT = 5.0
COMPLAIN_AT = 4
"""Failures in a row: the services of one start come up in any order, and that is no trouble."""
MAX_ANSWER = 16 << 20

type OpenBus = Callable[[], Bus]
type BusIsFed = Callable[[], bool]
"""Whether somebody publishes on the bus of this data directory; otherwise the API is asked."""


class _Answer(msgspec.Struct):
    rules: list[PayloadRule]


_answer_decoder = msgspec.json.Decoder(_Answer, strict=False)


class RuleSource:
    """Keeps the rules of `global` and `app:<source_app>` up to date. `apply` is called with all of them."""

    def __init__(
        self,
        *,
        open_bus: OpenBus,
        bus_is_fed: BusIsFed,
        source_app: str,
        api_url: str,
        cache_ttl: int,
        apply: Callable[[list[PayloadRule]], None],
    ) -> None:
        self._open_bus = open_bus
        self._bus_is_fed = bus_is_fed
        self._scopes = ("global", f"app:{source_app}")
        self._url = (
            f"{api_url.rstrip('/')}/interceptor/api/payload-rules/active/?{urlencode({'source_app': source_app})}"
        )
        self.cache_ttl = cache_ttl
        self._apply = apply
        self._snapshots: dict[str, Snapshot] = {}
        self._fresh_at = time.monotonic()
        self._shown: list[PayloadRule] = []
        self._failures = 0

    @property
    def version(self) -> int:
        """The highest version among the applied snapshots; 0 when there is none."""
        return max((snapshot.version for snapshot in self._snapshots.values()), default=0)

    @property
    def stale(self) -> bool:
        """Nothing could be read for longer than `cache_ttl` (and one try more)."""
        return time.monotonic() - self._fresh_at > self.cache_ttl + POLL_TIMEOUT

    async def run(self) -> None:
        """Until cancelled. Whatever fails is tried again; the rules that were read last stay in force."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self._watch))
            group.create_task(self._again(self._reread))

    async def _again(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # noqa: BLE001 - whatever it is, the rules in force stay and it is tried again
                self._failures += 1
                if self._failures == COMPLAIN_AT:
                    logger.warning("payload rules cannot be read now: %.200s", error)
                await asyncio.sleep(RETRY_AFTER)

    async def _watch(self) -> None:
        bus = self._open_bus()
        try:
            async for scope, raw in bus.watch_config(self._scopes):
                self._take(scope, raw)
        finally:
            await bus.close()

    async def _reread(self) -> None:
        if self._bus_is_fed():
            bus = self._open_bus()
            try:
                for scope in self._scopes:
                    raw = await bus.get_config(scope)
                    if raw is not None:
                        self._take(scope, raw)
            finally:
                await bus.close()
            self._succeeded()
        else:
            rules = await asyncio.to_thread(fetch, self._url, os.environ)
            self._show(rules)
            self._succeeded()
        await asyncio.sleep(self.cache_ttl)

    def _take(self, scope: str, raw: bytes) -> None:
        snapshot = decode_snapshot(raw)
        known = self._snapshots.get(scope)
        if known is None or snapshot.version >= known.version:
            self._snapshots[scope] = snapshot
        self._show(
            [rule for scope in self._scopes if scope in self._snapshots for rule in self._snapshots[scope].rules]
        )
        self._succeeded()

    def _show(self, rules: list[PayloadRule]) -> None:
        unique = list({rule.id: rule for rule in rules}.values())
        if unique != self._shown:
            self._shown = unique
            self._apply(unique)

    def _succeeded(self) -> None:
        self._fresh_at = time.monotonic()
        self._failures = 0


def fetch(url: str, env: Mapping[str, str]) -> list[PayloadRule]:
    """Asks the API. Blocks: for a thread. Raises httpx.HTTPError, msgspec.DecodeError."""
    headers = {}
    if token := env.get("MEGIDO_API_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    # No proxies from the environment: HTTP_PROXY may well be this very process.
    with httpx.Client(trust_env=False, timeout=POLL_TIMEOUT, verify=_tls()) as client:
        answer = client.get(url, headers=headers)
        answer.raise_for_status()
        return _answer_decoder.decode(answer.content[:MAX_ANSWER]).rules


@cache
def _tls() -> ssl.SSLContext:
    """One for all polls: each holds 0.7 MB outside of Python's heap, in a cycle that is seldom collected."""
    return httpx.create_ssl_context(trust_env=False)
