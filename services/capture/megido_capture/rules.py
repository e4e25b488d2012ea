"""Payload rules: which apply to a request, and what they do to it. Pure but for the request that they change."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import msgspec
import re2
from mitmproxy import http

from megido_capture.counters import Counters, contained
from megido_capture.flows import url_of
from megido_capture.state import Registry
from megido_shared.config import PayloadRule

logger = logging.getLogger(__name__)

BODY_CAP = 4 << 20
"""Bytes of a body that rules change: it is held and parsed on the event loop. A larger one passes as it is."""

_JSON = ("application/json", "+json")
_FORM = "application/x-www-form-urlencoded"


class CompiledRule:
    __slots__ = ("matches", "rule")

    def __init__(self, rule: PayloadRule) -> None:
        """Raises re2.error when the pattern is none."""
        options = re2.Options()
        options.log_errors = False
        self.rule = rule
        self.matches = re2.compile(rule.target_url_pattern, options).search


class RuleSet:
    """The rules that this node applies, replaced as a whole. A rule that fails is counted and harms nothing else."""

    def __init__(self, counters: Counters, source_app: str) -> None:
        self._counters = counters
        self._source_app = source_app
        self._heads: tuple[CompiledRule, ...] = ()
        self._bodies: tuple[CompiledRule, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._heads or self._bodies)

    def replace(self, rules: Iterable[PayloadRule]) -> None:
        compiled = [found for rule in rules if self._applies(rule) and (found := self._compile(rule))]
        self._heads = tuple(item for item in compiled if item.rule.injection_type != "body")
        self._bodies = tuple(item for item in compiled if item.rule.injection_type == "body")

    def wants_body(self, request: http.Request) -> bool:
        """Whether a rule changes this request's body: then all of it has to be there before it goes on."""
        return bool(self._bodies) and _kind(request) != "" and bool(self._matching(self._bodies, request))

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
        if not self._bodies or not _kind(request):
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
        applied = []
        for item in self._matching(rules, request) if rules else ():
            try:
                inject(item.rule, request)
            except Exception as error:  # noqa: BLE001 - a rule that fails harms nothing but itself
                self._failed(item.rule, error)
            else:
                applied.append(item.rule.id)
                self._counters[f"rule_hits:{item.rule.id}"] += 1
        return tuple(applied)

    def _matching(self, rules: Sequence[CompiledRule], request: http.Request) -> list[CompiledRule]:
        url = url_of(request)
        return [item for item in rules if item.matches(url)]

    def _applies(self, rule: PayloadRule) -> bool:
        return rule.active and (not rule.target_apps or self._source_app in rule.target_apps)

    def _compile(self, rule: PayloadRule) -> CompiledRule | None:
        try:
            return CompiledRule(rule)
        except re2.error as error:
            self._failed(rule, error)
            return None

    def _failed(self, rule: PayloadRule, error: Exception) -> None:
        name = f"rule_errors:{rule.id}"
        self._counters[name] += 1
        if self._counters[name] == 1:
            logger.warning("payload rule %s (%s) cannot be applied: %.200s", rule.id, rule.name, error)


class NotApplicable(Exception):
    """The request has no place for the rule's payload."""


def inject(rule: PayloadRule, request: http.Request) -> None:
    """Puts the payload where the rule says; what the rule does not name keeps its bytes. Raises NotApplicable."""
    point, payload = rule.injection_point, rule.payload_content
    match rule.injection_type:
        case "header":
            name = point.lower() if request.is_http2 else point
            if not name or any(byte in f"{name}{payload}" for byte in "\r\n\0"):
                raise NotApplicable("a header cannot hold a line break or NUL")
            request.headers[name] = payload
        case "param":
            path, mark, query = request.data.path.partition(b"?")
            pair = b"=".join(quote(part, safe="").encode() for part in (point, payload))
            request.data.path = path + b"?" + _put(query if mark else b"", b"&", point, pair)
        case "cookie":
            if any(byte in f"{point}{payload}" for byte in "\r\n\0;"):
                raise NotApplicable("a cookie cannot hold a line break, NUL or semicolon")
            _put_cookie(request, point, f"{point}={payload}".encode())
        case "body":
            _put_body(request, point, payload)


def _put(pairs: bytes, separator: bytes, name: str, pair: bytes) -> bytes:
    """`pairs` with the first one called `name` replaced and further ones removed, or `pair` appended."""
    wanted = name.encode()
    kept: list[bytes] = []
    placed = False
    for item in pairs.split(separator) if pairs else ():
        if unquote_to_bytes(item.partition(b"=")[0].strip().replace(b"+", b" ")) != wanted:
            kept.append(item)
        elif not placed:
            kept.append(pair)
            placed = True
    if not placed:
        kept.append(pair)
    return separator.join(kept)


def _put_cookie(request: http.Request, name: str, pair: bytes) -> None:
    fields = list(request.headers.fields)
    at = [index for index, (field, _) in enumerate(fields) if field.lower() == b"cookie"]
    if not at:
        request.headers["cookie" if request.is_http2 else "Cookie"] = pair.decode("utf-8", "surrogateescape")
        return
    # HTTP/2 may send a field for each cookie; together they are one list.
    cookies = b"; ".join(fields[index][1] for index in at)
    items = [item.strip() for item in cookies.split(b";") if item.strip()]
    wanted = name.encode()
    place = next((index for index, item in enumerate(items) if item.partition(b"=")[0] == wanted), len(items))
    rest = [item for item in items if item.partition(b"=")[0] != wanted]
    rest.insert(place, pair)
    fields[at[0]] = (fields[at[0]][0], b"; ".join(rest))
    request.headers.fields = tuple(field for index, field in enumerate(fields) if index not in at[1:])


def _put_body(request: http.Request, name: str, payload: str) -> None:
    content = request.raw_content or b""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise NotApplicable("the body is compressed")
    match _kind(request):
        case "json":
            document: Any = msgspec.json.decode(content or b"{}")
            if not isinstance(document, dict):
                raise NotApplicable("the body is no JSON object")
            document[name] = payload
            changed = msgspec.json.encode(document)
        case "form":
            pair = b"=".join(quote(part, safe="").encode() for part in (name, payload))
            changed = _put(content, b"&", name, pair)
        case _:
            raise NotApplicable("the body is neither JSON nor a form")
    request.raw_content = changed
    if "transfer-encoding" not in request.headers:
        request.headers["content-length" if request.is_http2 else "Content-Length"] = str(len(changed))


def _kind(request: http.Request) -> str:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.endswith(_JSON):
        return "json"
    return "form" if media_type == _FORM else ""


class Rules:
    """The addon that applies them."""

    name = "megido-rules"

    def __init__(self, rules: RuleSet, registry: Registry, counters: Counters) -> None:
        self.rules = rules
        self.counters = counters
        self._registry = registry

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
