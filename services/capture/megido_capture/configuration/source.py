"""Where the configuration comes from: the bus's snapshots, or the API, polled."""

import asyncio
import logging
import os
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import cast
from urllib.parse import urlencode

import httpx
import msgspec

from megido_capture.configuration.live import GLOBAL, LiveConfiguration
from megido_shared.bus.base import Bus
from megido_shared.config import PayloadRule, Snapshot
from megido_shared.errors import Unavailable

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a poll, in the host's own log

RETRY_AFTER = 2.0
POLL_EVERY = 2.0
"""Seconds between questions to the API: what is revoked there is revoked here as soon as on a bus."""
POLL_TIMEOUT = 5.0
COMPLAIN_AT = 4
"""Failures in a row: the services of one start come up in any order, and that is no trouble."""
ANSWER_TIMEOUT = 30.0
"""Seconds for all of an answer's body: one that trickles would keep the next question waiting."""
MAX_ANSWER = 16 << 20

type OpenBus = Callable[[], Bus]
type BusIsFed = Callable[[], bool]
"""Whether somebody publishes on the bus of this data directory; otherwise the API is asked."""


class _Answer(msgspec.Struct):
    snapshots: list[Snapshot]


@dataclass(frozen=True, slots=True)
class Polled:
    """What the API answered: all scopes, under a `tag` to ask again with, or of an older one its rules alone. Neither:
    nothing has changed since that tag."""

    snapshots: Sequence[Snapshot] | None = None
    rules: Sequence[PayloadRule] | None = None
    tag: str = ""


class _RulesAnswer(msgspec.Struct):
    rules: list[PayloadRule]


_decoder = msgspec.json.Decoder(_Answer)
_rules_decoder = msgspec.json.Decoder(_RulesAnswer, strict=False)


class ConfigSource:
    """Keeps a live configuration up to date, and its copy on disk."""

    def __init__(
        self,
        live: LiveConfiguration,
        *,
        open_bus: OpenBus,
        bus_is_fed: BusIsFed,
        api_url: str,
        source_app: str,
        node: str,
        cache_ttl: int,
    ) -> None:
        self.cache_ttl = cache_ttl
        self._live = live
        self._open_bus = open_bus
        self._bus_is_fed = bus_is_fed
        self._api = (api_url.rstrip("/"), source_app, node)
        self._fresh_at = time.monotonic()
        self._failures = 0
        self._unsaved = asyncio.Event()
        self._known = ("", 0)
        """The tag of the API's answer that is in force, and what the bus had said by then."""

    @property
    def stale(self) -> bool:
        """Nothing could be read for longer than `cache_ttl` (and one try more)."""
        return time.monotonic() - self._fresh_at > self.cache_ttl + POLL_TIMEOUT

    async def run(self) -> None:
        """Until cancelled. Whatever fails is tried again; what was read last stays in force."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._again(self._watch))
                group.create_task(self._again(self._reread))
                group.create_task(self._again(self._save))
        finally:
            if self._live.unsaved:
                self._live.save()

    async def _again(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # noqa: BLE001 - whatever it is, what is in force stays and it is tried again
                self._failures += 1
                if self._failures == COMPLAIN_AT:
                    logger.warning("the configuration cannot be read, or kept, now: %.200s", error)
                await asyncio.sleep(RETRY_AFTER)

    async def _watch(self) -> None:
        bus = self._open_bus()
        try:
            async for scope, raw in bus.watch_config(self._live.scopes):
                self._take(scope, raw)
        finally:
            await bus.close()

    async def _reread(self) -> None:
        if self._bus_is_fed():
            await self._reread_bus()
            await asyncio.sleep(self.cache_ttl)
        else:
            await self._poll()
            await asyncio.sleep(min(POLL_EVERY, self.cache_ttl))

    async def _poll(self) -> None:
        """Asks the API until its answer is not older than what the bus has said meanwhile."""
        current = False
        while not current:
            asked_at = self._live.taken
            tag, known_at = self._known
            asking = partial(fetch, *self._api, os.environ, tag if known_at == asked_at else "")
            found = await _aside(asking)
            current = True
            if found.rules is not None:
                self._live.replace_rules(found.rules)
                self._known = ("", 0)
            elif found.snapshots is not None and (current := self._live.replace(found.snapshots, asked_at=asked_at)):
                self._known = (found.tag, asked_at)
        self._succeeded()

    async def _reread_bus(self) -> None:
        bus = self._open_bus()
        try:
            found = await bus.get_configs()
            for scope in self._live.scopes:
                if scope in found:  # nothing there says nothing: a bus that is new has not been told yet
                    self._take(scope, found[scope])
        finally:
            await bus.close()
        self._succeeded()

    async def _save(self) -> None:
        await self._unsaved.wait()
        await asyncio.to_thread(self._live.save)
        if not self._live.unsaved:
            self._unsaved.clear()

    def _take(self, scope: str, raw: bytes) -> None:
        self._live.take(scope, raw)
        self._succeeded()

    def _succeeded(self) -> None:
        self._fresh_at = time.monotonic()
        self._failures = 0
        if self._live.unsaved:
            self._unsaved.set()


async def _aside[T](work: Callable[[], T]) -> T:
    """Runs it in a thread that nobody waits for when this is cancelled. The end of an event loop waits for the threads
    of its own executor: an API that is slow would hold up the stop of a node."""
    loop = asyncio.get_running_loop()
    outcome = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # noqa: BLE001 - raised where it is awaited
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="poll", daemon=True).start()
    return cast(T, await outcome)


def fetch(api_url: str, source_app: str, node: str, env: Mapping[str, str], tag: str = "") -> Polled:
    """Asks the API for all scopes, unless they are still those of `tag`; an older one, that knows none, for its rules.
    Blocks: for a thread. Raises httpx.HTTPError, msgspec.DecodeError, and Unavailable for an API that has not begun."""
    headers = {"If-None-Match": tag} if tag else {}
    if token := env.get("MEGIDO_API_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    # No proxies from the environment: HTTP_PROXY may well be this very process.
    with httpx.Client(trust_env=False, timeout=POLL_TIMEOUT, verify=_tls(), headers=headers) as client:
        query = urlencode({"source_app": source_app, "node": node})
        answer, body = _get(client, f"{api_url}/proxy/api/config/active/?{query}")
        if tag and answer.status_code == httpx.codes.NOT_MODIFIED:
            return Polled()
        if answer.status_code != httpx.codes.NOT_FOUND:
            answer.raise_for_status()
            snapshots = _decoder.decode(body).snapshots
            if not any(snapshot.scope == GLOBAL for snapshot in snapshots):
                # Every database has one as soon as an API serves it. Taken at its word, this would open every proxy.
                raise Unavailable("the API has no configuration yet")
            return Polled(snapshots=snapshots, tag=answer.headers.get("etag", ""))
        query = urlencode({"source_app": source_app})
        answer, body = _get(client, f"{api_url}/interceptor/api/payload-rules/active/?{query}")
        answer.raise_for_status()
        return Polled(rules=_rules_decoder.decode(body).rules)


def _get(client: httpx.Client, url: str) -> tuple[httpx.Response, bytes]:
    """An answer and its body. Raises httpx.HTTPError, also when the body is too large or takes too long."""
    deadline, body = time.monotonic() + ANSWER_TIMEOUT, bytearray()
    with client.stream("GET", url) as answer:
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > MAX_ANSWER:
                raise httpx.DecodingError(f"the answer has more than {MAX_ANSWER} bytes", request=answer.request)
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the answer does not come to its end", request=answer.request)
    return answer, bytes(body)


@cache
def _tls() -> ssl.SSLContext:
    """One for all polls: each holds 0.7 MB outside of Python's heap, in a cycle that is seldom collected."""
    return httpx.create_ssl_context(trust_env=False)
