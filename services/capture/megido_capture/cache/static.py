"""Static assets from memory: which requests and responses come into question is decided here; whether one may be
stored, used as it is or must be asked about again, hishel decides by the rules of RFC 9111 for a shared cache.

Clients do not share what RFC 9111 would let them: an answer to a request with credentials or cookies is neither taken
from memory nor kept unless it says for how long everybody may have it, and requests with fields that servers build
answers by, though no `Vary` names them, pass by.

Left alone, where answering from memory need not be right: requests with conditions of their own, a range or a body,
and those that a payload rule changed; responses that set cookies, or are compressed without `Vary: Accept-Encoding`;
bodies that end with their connection, and those above `OBJECT` bytes.
"""

from collections.abc import Iterable

import hishel
from mitmproxy import http

from megido_capture.cache.store import Fields, Store, Stored, dated, entry, now, view
from megido_capture.counters import Counters
from megido_capture.recording.flows import content_length, url_of
from megido_capture.recording.state import FlowState

OBJECT = 512 * 1024
"""Bytes of the largest body that is kept."""

STATIC = (b"image/", b"font/", b"audio/", b"video/", b"application/font-", b"application/x-font-")
STATIC_TYPES = frozenset(
    (
        b"text/css",
        b"text/javascript",
        b"application/javascript",
        b"application/x-javascript",
        b"application/wasm",
        b"application/manifest+json",
        b"application/vnd.ms-fontobject",
    )
)
SAFE = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))

_ASIDE = frozenset(
    (
        b"range",
        b"if-range",
        b"if-none-match",
        b"if-modified-since",
        b"if-match",
        b"if-unmodified-since",
        b"upgrade",
        # What a server may build an answer by and caches do not know of: one client must not choose another's answer.
        b"forwarded",
        b"x-original-url",
        b"x-rewrite-url",
        b"x-host",
        b"x-http-method-override",
        b"x-http-method",
        b"x-method-override",
    )
)
_PERSONAL = frozenset((b"authorization", b"cookie"))
_OPTIONS: hishel.CacheOptions = {"shared": True, "supported_methods": ["GET"], "allow_stale": False}


class Fetch:
    """A request that goes upstream and whose answer may be kept, by the cache `of` and no later one. With `stale`, it
    goes with conditions of ours, and `asked` says what follows from a 304."""

    def __init__(
        self,
        of: "StaticCache",
        request: hishel.Request,
        stale: Stored | None = None,
        asked: hishel.NeedRevalidation | None = None,
    ) -> None:
        self.of = of
        self.request = request
        self.stale = stale
        self.asked = asked
        self.fields: Fields | None = None
        """The client's own header fields, while others are sent."""
        self.pieces: list[bytes] | None = None
        """A body that passes without being held by mitmproxy."""
        self._size = 0

    def collect(self, data: bytes) -> Iterable[bytes] | bytes:
        """A `stream` function: keeps a copy of what passes as long as it is small enough."""
        self._size += len(data)
        if self._size > OBJECT:
            self.pieces = None
        elif self.pieces is not None:
            self.pieces.append(data)
        return data

    def restore(self, request: http.Request) -> None:
        """What is recorded is what the client asked."""
        if self.fields is not None:
            request.headers.fields, self.fields = self.fields, None


class StaticCache:
    def __init__(self, counters: Counters) -> None:
        self.store = Store()
        self._counters = counters

    def request(self, flow: http.HTTPFlow, state: FlowState) -> None:
        """Answers the request, or puts the conditions into it by which a stale response is asked about."""
        request = flow.request
        if request.data.method != b"GET" or flow.response is not None:
            return
        url = _key(request)
        if url not in self.store or not _comes_into_question(request, state):
            return
        seen = _seen(request, url)
        known = [item for item in self.store.get(url) if _is_variant(item, seen)]
        if known and _is_personal(request.headers.fields) and not _is_everybodys(known[-1].entry.response.headers):
            return
        follows = hishel.IdleClient(options=_OPTIONS).next(seen, [item.entry for item in known[-1:]])
        if isinstance(follows, hishel.FromCache):
            flow.response = _response(known[-1], follows.entry.response.headers["age"])
            state.cached = True
            self._counters["cache_hits"] += 1
        elif isinstance(follows, hishel.NeedRevalidation):
            state.fetch = fetch = Fetch(self, seen, known[-1], follows)
            fetch.fields = request.headers.fields
            for name in (b"if-none-match", b"if-modified-since"):
                if (value := follows.request.headers.get(name.decode())) is not None:
                    request.headers.fields += ((name if request.is_http2 else name.title(), value.encode("latin-1")),)

    def responseheaders(self, flow: http.HTTPFlow, state: FlowState) -> None:
        request, response = flow.request, flow.response
        if response is None or state.cached:
            return
        if request.data.method not in SAFE:
            self._invalidate(request, response)
        elif request.data.method == b"GET" and response.data.status_code == 200 and is_static(response):
            if state.fetch is None and _comes_into_question(request, state) and _may_be_shared(request, response):
                state.fetch = Fetch(self, _seen(request, _key(request)))
            if state.fetch is not None and _ends_by_itself(response):
                state.fetch.pieces = []
                response.stream = state.fetch.collect

    def fetched(self, request: http.Request, response: http.Response, fetch: Fetch) -> None:
        """A whole answer that came from the server, to a request as its client sent it."""
        if response.data.status_code != 200:
            return
        if fetch.stale is not None:
            self.store.remove(fetch.stale)  # it is superseded, whatever becomes of this one
        if not is_static(response) or not _may_be_shared(request, response):
            return
        self._counters["cache_misses"] += 1
        content = response.data.content
        if response.stream:
            content = None if fetch.pieces is None else b"".join(fetch.pieces)
        if content is None or len(content) > OBJECT or not _may_be_kept(response):
            return
        answer = hishel.Response(200, dated(response.headers.fields, now()))
        follows = hishel.CacheMiss(request=fetch.request, options=_OPTIONS).next(answer)
        if not isinstance(follows, hishel.StoreAndUse):
            return
        for same in self.store.get(fetch.request.url):
            if _is_variant(same, fetch.request):
                self.store.remove(same)
        made = entry(_selecting(fetch.request, follows.response.headers), follows.response.headers)
        fields = _storable(response.headers, follows.response.headers)
        self.store.add(Stored(made, fields, response.data.http_version, response.data.reason, content))
        self._counters["cache_stored"] += 1

    def refreshed(self, old: Stored, new: Stored | None) -> None:
        """A 304: `new` takes the place of `old`, or nothing does."""
        self._counters["cache_hits"] += 1
        if old in self.store.get(old.entry.request.url):  # else given up meanwhile
            self.store.remove(old)
            if new is not None:
                self.store.add(new)
                self._counters["cache_revalidated"] += 1

    def _invalidate(self, request: http.Request, response: http.Response) -> None:
        url = _key(request)
        if url not in self.store:
            return
        known = {item.entry.id: item for item in self.store.get(url)}
        asked = hishel.IdleClient(options=_OPTIONS).next(_seen(request, url), [item.entry for item in known.values()])
        if isinstance(asked, hishel.CacheMiss):
            follows = asked.next(hishel.Response(response.data.status_code, view(response.headers.fields)))
            for number in follows.entry_ids if isinstance(follows, hishel.InvalidateEntries) else ():
                self.store.remove(known[number])


def answered(flow: http.HTTPFlow, state: FlowState, fetch: Fetch, cache: StaticCache | None) -> None:
    """The server's whole answer to a request of `request`. Also when the cache was turned off meanwhile (None): the
    client never asked whether anything was modified."""
    fetch.restore(flow.request)
    response = flow.response
    if response is None:
        return
    if fetch.stale is None or fetch.asked is None or response.data.status_code != 304:
        if cache is not None:
            cache.fetched(flow.request, response, fetch)
        return
    new = _refreshed(fetch.stale, fetch.asked, response.headers.fields)
    flow.response = _response(new or fetch.stale)
    flow.response.headers.fields += tuple(field for field in response.headers.fields if _name(field) == "set-cookie")
    state.cached = True
    if cache is not None:
        personal = _is_personal(flow.request.headers.fields)
        cache.refreshed(
            fetch.stale, new if new and (not personal or _is_everybodys(new.entry.response.headers)) else None
        )


def is_static(response: http.Response) -> bool:
    for name, value in response.headers.fields:
        if len(name) == 12 and name.lower() == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
            return kind in STATIC_TYPES or kind.startswith(STATIC)
    return False


def _refreshed(stale: Stored, asked: hishel.NeedRevalidation, fields: Fields) -> Stored | None:
    """The stored response as a 304 freshens it (RFC 9111, 4.3.4). None when that 304 is about something else."""
    answer = hishel.Response(304, dated(fields, now()))
    follows = asked.next(answer)
    if not isinstance(follows, hishel.NeedToBeUpdated):
        return None
    headers = follows.updating_entries[-1].response.headers
    taken = {name for name in answer.headers if headers.get_list(name) == answer.headers.get_list(name)}
    taken -= {"set-cookie", "age"}
    kept = tuple(field for field in stale.fields if _name(field) not in taken)
    kept += tuple(field for field in fields if _name(field) in taken)
    made = entry(stale.entry.request, headers)
    return Stored(made, kept, stale.http_version, stale.reason, stale.content)


def _key(request: http.Request) -> str:
    """Where it goes and what it says that it wants: a Host of somebody else's must not fill another's place."""
    return f"{url_of(request)} {request.host_header}"


def _seen(request: http.Request, url: str) -> hishel.Request:
    """The request for hishel, which knows of its directives only `no-cache`: what asks for something fresher than
    usual is taken for that."""
    headers = view(request.headers.fields)
    pragma = "cache-control" not in headers and "no-cache" in headers.get("pragma", "").lower()
    if pragma or _directives(headers.get("cache-control", "")) & {"max-age", "min-fresh"}:
        headers.pop("cache-control", None)
        headers["cache-control"] = "no-cache"
    return hishel.Request(request.data.method.decode("ascii", "replace"), url, headers)


def _directives(value: str) -> set[str]:
    return {item.partition("=")[0].strip().lower() for item in value.split(",")}


def _is_variant(stored: Stored, request: hishel.Request) -> bool:
    """Whether it is what `Vary` selects for this request (RFC 9111, 4.1). hishel would ask the server about another
    variant too, but a 304 to `If-Modified-Since` does not say which variant is meant."""
    names = stored.entry.response.headers.get("vary", "").split(",")
    then, this = stored.entry.request.headers, request.headers
    return all(then.get(name.strip()) == this.get(name.strip()) for name in names)


def _selecting(request: hishel.Request, answer: hishel.Headers) -> hishel.Request:
    """Of a request what `Vary` asks for: nothing else of a client is kept."""
    names = {name.strip().lower() for name in answer.get("vary", "").split(",")}
    kept = {name: request.headers.get_list(name) for name in names if name in request.headers}
    return hishel.Request(request.method, request.url, hishel.Headers({k: v for k, v in kept.items() if v}))


def _is_personal(fields: Fields) -> bool:
    return any(field[0].lower() in _PERSONAL for field in fields)


def _is_everybodys(headers: hishel.Headers) -> bool:
    """Whether a response says for how long everybody may have it. `public` alone leaves the time to a guess."""
    directives = _directives(headers.get("cache-control", ""))
    timed = "max-age" in directives or "expires" in headers
    return "set-cookie" not in headers and ("s-maxage" in directives or ("public" in directives and timed))


def _may_be_shared(request: http.Request, response: http.Response) -> bool:
    return not _is_personal(request.headers.fields) or _is_everybodys(view(response.headers.fields))


def _comes_into_question(request: http.Request, state: FlowState) -> bool:
    if state.rules or request.data.content or state.request_tee is not None:
        return False
    for field in request.headers.fields:
        name = field[0].lower()
        if name in _ASIDE or name.startswith(b"x-forwarded"):
            return False
        if name == b"cache-control" and _directives(field[1].decode("latin-1")) & {"no-store", "only-if-cached"}:
            return False
    return True


def _ends_by_itself(response: http.Response) -> bool:
    """A body without a length that still says where it ends: one that ends with its connection may have been cut."""
    return content_length(response.headers) is None and (response.is_http2 or "transfer-encoding" in response.headers)


def _may_be_kept(response: http.Response) -> bool:
    headers = response.headers
    vary = headers.get("vary", "").lower()
    if "set-cookie" in headers or "*" in vary:
        return False
    return headers.get("content-encoding", "identity").lower() == "identity" or "accept-encoding" in vary


def _storable(headers: http.Headers, storable: hishel.Headers) -> Fields:
    """What hishel leaves, without what belongs to a connection or is made anew."""
    named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
    dropped = named | {"age", "content-length", "trailer"}
    return tuple(field for field in headers.fields if _name(field) in storable and _name(field) not in dropped)


def _response(stored: Stored, age: str | None = None) -> http.Response:
    fields = (*stored.fields, (b"Content-Length", b"%d" % len(stored.content)))
    if age is not None:
        fields += ((b"Age", age.encode()),)
    if stored.http_version.startswith(b"HTTP/2"):
        fields = tuple((name.lower(), value) for name, value in fields)
    moment = now()
    return http.Response(
        stored.http_version, 200, stored.reason, http.Headers(fields), stored.content, None, moment, moment
    )


def _name(field: tuple[bytes, bytes]) -> str:
    return field[0].decode("latin-1").lower()
