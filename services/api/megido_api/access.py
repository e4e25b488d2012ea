"""Who may come in: the Host allow-list, cross-site browser writes, the bearer token, the size of a request.

Pure ASGI, in front of every route. Roles come with users.
"""

import hmac
from collections.abc import Iterable

from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megido_api.problems import Problem
from megido_api.settings import Settings
from megido_api.state import StateDep

_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
_WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - they are no names to answer to
_PROBES = frozenset({"/livez", "/readyz"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_SAME = frozenset({"same-origin", "none"})


def host_name(authority: str) -> str:
    """The name or address of a Host header or an origin, without port and brackets, in lower case."""
    authority = authority.strip().lower()
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.rpartition(":")[0] if authority.count(":") == 1 else authority


def token_matches(authorization: str, token: str) -> bool:
    """Whether the header is `Bearer <token>`, in a time that does not tell where they differ."""
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def unauthorized() -> Problem:
    return Problem(
        401, "unauthorized", "send Authorization: Bearer <MEGIDO_API_TOKEN>", headers={"WWW-Authenticate": "Bearer"}
    )


async def require_token(state: StateDep, request: Request) -> None:
    """A dependency of routes that ask for the token wherever one is set, on loopback too."""
    token = state.settings.token
    if token and not token_matches(request.headers.get("authorization", ""), token):
        raise unauthorized()


class Guard:
    """Answers what must not reach a route; hands the rest on, with its body bounded."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._token = settings.token if settings.token_required else ""
        self._max_body = settings.max_body_bytes
        self._any_host = "*" in settings.allow_hosts
        self._hosts = _LOOPBACK_HOSTS | set(_names(settings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = None if scope["path"] in _PROBES else self._refused(scope, headers)
        problem = problem or self._too_large(headers)
        if problem is not None:
            await problem.response()(scope, receive, send)
            return
        await self._app(scope, _Bounded(receive, self._max_body), _no_sniffing(send))

    def _refused(self, scope: Scope, headers: Headers) -> Problem | None:
        host = headers.get("host", "")
        if not self._host_allowed(scope, host):
            return Problem(403, "host_not_allowed", "this Host is not served here; --allow-host adds a name")
        if scope["method"] not in _SAFE_METHODS and _cross_site(headers, host):
            return Problem(403, "cross_site", "another site's page must not write here")
        if self._token and not token_matches(headers.get("authorization", ""), self._token):
            return unauthorized()
        return None

    def _host_allowed(self, scope: Scope, host: str) -> bool:
        """A page that rebinds its own name to our address still sends that name. An address that the request
        did arrive at is no such name."""
        name = host_name(host)
        server = scope.get("server")
        return self._any_host or name in self._hosts or (server is not None and name == server[0])

    def _too_large(self, headers: Headers) -> Problem | None:
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._max_body:
            return Problem(413, "too_large", f"more than {self._max_body} bytes", limit=self._max_body)
        return None


def _names(settings: Settings) -> Iterable[str]:
    for name in (settings.host, *settings.allow_hosts):
        if host_name(name) not in _WILDCARDS:
            yield host_name(name)


def _cross_site(headers: Headers, host: str) -> bool:
    """Browsers say where a request comes from; other clients send neither header."""
    site = headers.get("sec-fetch-site")
    if site is not None and site.lower() not in _SAME:
        return True
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != host.strip().lower()


class _Bounded:
    """`receive`, until the body is larger than declared bounds allow (a chunked one declares nothing)."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise HTTPException(413, f"more than {self._limit} bytes")
        return message


def _no_sniffing(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in message["headers"]}
            if b"x-content-type-options" not in names:
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
        await send(message)

    return sending
