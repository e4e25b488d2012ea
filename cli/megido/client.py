"""The REST API as Python calls. Answers are the API's JSON documents; the types name the fields that are read here."""

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, cast
from urllib.parse import quote

import httpx

from megido_shared.errors import MegidoError, Unavailable
from megido_shared.settings import DEFAULT_API_URL

_PAGE = 500
_REPLAY_GRACE_S = 40.0


class Listed(TypedDict):
    id: int
    method: str
    url: str
    host: str
    protocol: str
    source_ip: str
    timestamp: str
    request_size: int
    is_replay: bool
    status_code: int | None
    response_time: float | None


class Page(TypedDict):
    requests: list[Listed]
    total: int
    limit: int
    offset: int
    next_cursor: NotRequired[str | None]


class Response(TypedDict):
    status_code: int
    headers: dict[str, str]
    raw_headers: NotRequired[list[tuple[str, str]]]
    body: str
    body_encoding: NotRequired[str]
    truncated: NotRequired[bool]
    response_time: float | None
    response_size: int
    cached: bool
    error_message: str | None


class Detail(TypedDict):
    id: int
    method: str
    url: str
    headers: dict[str, str]
    raw_headers: NotRequired[list[tuple[str, str]]]
    body: str
    body_encoding: NotRequired[str]
    truncated: NotRequired[bool]
    timestamp: str
    host: str
    port: int
    source_ip: str
    protocol: str
    request_size: int
    user_agent: str
    is_replay: bool
    original_request_id: int | None
    response: NotRequired[Response]
    error: NotRequired[dict[str, str] | None]


class ListedError(TypedDict):
    id: int
    error_type: str
    error_message: str
    url: str
    source_ip: str
    timestamp: str
    request_id: int | None
    stack_trace: str


class DeadLetter(TypedDict):
    id: int
    topic: str
    partition: int
    offset: int
    source_id: str
    event_type: str
    reason: str
    size: int
    state: str
    attempts: int
    created_at: str
    changed_by: str | None
    changed_at: str | None
    decoded: NotRequired[Any]
    value_base64: NotRequired[str]


class Replayed(TypedDict):
    """`deviations`: how the request that was sent differs from the original."""

    success: bool
    request: dict[str, Any]
    response: dict[str, Any]
    timestamp: str
    error_message: str | None
    replayed_request_id: int | None
    job_id: NotRequired[str]
    deviations: NotRequired[list[str]]


class ApiError(MegidoError):
    """The API refused: its status, its code and its message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def api_url_from(env: Mapping[str, str]) -> str:
    return env.get("MEGIDO_API_URL") or env.get("PROXY_API_URL") or DEFAULT_API_URL


class Client:
    """Speaks to one Megido API. Without arguments: MEGIDO_API_URL, PROXY_API_URL or http://localhost:8000, and
    MEGIDO_API_TOKEN. Never through a proxy of the environment, which may well be Megido's own.

    Every call raises ApiError when the API refuses and Unavailable when it cannot be reached.
    """

    def __init__(self, api_url: str = "", token: str = "", *, timeout: float = 30.0) -> None:
        self.api_url = (api_url or api_url_from(os.environ)).rstrip("/")
        token = token or os.environ.get("MEGIDO_API_TOKEN", "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = timeout
        self._http = httpx.Client(trust_env=False, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def requests(self, *, limit: int = 100, offset: int = 0, **filters: Any) -> Page:
        """One page of the list, newest first. Filters: method, protocol, source_ip, is_replay, search, cursor."""
        query = {name: _text(value) for name, value in filters.items() if value not in (None, "")}
        return cast(Page, self._get("/proxy/api/requests/", query | {"limit": str(limit), "offset": str(offset)}))

    def each_request(self, **filters: Any) -> Iterator[Listed]:
        """All requests that match, newest first, fetched page by page as they are consumed."""
        cursor: str | None = None
        while True:
            page = self.requests(limit=_PAGE, cursor=cursor, **filters)
            yield from page["requests"]
            cursor = page.get("next_cursor")
            if not cursor:
                return

    def each_error(self, **filters: Any) -> Iterator[ListedError]:
        """All errors that match, newest first, fetched page by page as they are consumed. Filters: error_type,
        source_ip."""
        query = {name: _text(value) for name, value in filters.items() if value not in (None, "")}
        query["limit"] = str(_PAGE)
        while True:
            page = self._get("/proxy/api/errors/list/", query)
            yield from page["errors"]
            if not page.get("next_cursor"):
                return
            query["cursor"] = page["next_cursor"]

    def request(self, reference: int | str) -> Detail:
        """One request with its response, by id or flow_id."""
        return cast(Detail, self._get(f"/proxy/api/requests/{reference}/"))

    def replay(
        self, reference: int | str, *, target_url: str = "", verify_tls: bool = True, timeout: float = 30.0
    ) -> Replayed:
        """Sends a request again and waits for its answer. A send that failed is an answer with `success` false;
        one that takes longer than the API waits raises Unavailable and goes on."""
        document = {"verify_tls": verify_tls, "timeout": timeout} | ({"target_url": target_url} if target_url else {})
        status, answer = self._call(
            "POST", f"/proxy/api/requests/{reference}/replay/", json=document, timeout=timeout + _REPLAY_GRACE_S
        )
        if status == 202:
            where = f"{self.api_url}{answer.get('job_url', '')}"
            raise Unavailable(f"request {reference} is still being sent; see {where}")
        return cast(Replayed, answer)

    def newest_id(self) -> int:
        """The highest id that a stored request has; 0 when there is none."""
        return max((request["id"] for request in self.requests(limit=100)["requests"]), default=0)

    def stats(self) -> dict[str, Any]:
        return self._get("/proxy/api/stats/")

    def config(self, scope: str = "global") -> dict[str, Any]:
        """The configuration in force in a scope: `global`, `app:<source_app>` or `node:<node>`."""
        return self._get(_config_path(scope))

    def change_config(self, scope: str, fields: Mapping[str, Any], *, version: int | None = None) -> dict[str, Any]:
        """Changes fields and returns the configuration; None takes one out. `version`: the one that this is a change
        of; ApiError (409) when it is not the current one."""
        document = dict(fields) | ({} if version is None else {"version": version})
        return cast("dict[str, Any]", self._call("PATCH", _config_path(scope), json=document)[1])

    def config_history(self, *, scope: str = "", limit: int = 100) -> dict[str, Any]:
        """Changes of settings and payload rules, newest first."""
        query = {"limit": str(limit)} | ({"scope": scope} if scope else {})
        return self._get("/proxy/api/config/history/", query)

    def nodes(self, *, alive: bool | None = None) -> dict[str, Any]:
        """The nodes that were heard of, the latest first."""
        return self._get("/proxy/api/nodes/", {} if alive is None else {"alive": _text(alive)})

    def accounting(self) -> dict[str, Any]:
        """What became of everything that each node captured."""
        return self._get("/proxy/api/accounting/")

    def recent_logs(self, log_type: str = "requests", limit: int = 100) -> dict[str, Any]:
        """The newest entries of the API's JSON log files, in `logs`: requests, responses, websockets, errors or auth.
        On the machine of the files `megido.ProxyLogger` reads them without an API."""
        return self._get(_LOGS, {"type": log_type, "limit": str(limit)})

    def general_log(self, limit: int = 100) -> dict[str, Any]:
        """The last lines of proxy_general.log, newest first, in `lines`."""
        return self._get(f"{_LOGS}general/", {"limit": str(limit)})

    def clean_logs(self, days_to_keep: int = 30, *, dry_run: bool = False) -> dict[str, Any]:
        """Removes log files of days that ended more than `days_to_keep` days ago; how many, in `removed`."""
        document = {"days_to_keep": days_to_keep, "dry_run": dry_run}
        return cast("dict[str, Any]", self._call("POST", f"{_LOGS}cleanup/", json=document)[1])

    def retention(self) -> dict[str, Any]:
        """What is kept for how long, and what is stored by day."""
        return self._get(_RETENTION)

    def change_retention(self, **fields: int) -> dict[str, Any]:
        """Changes the policy: days, max_bytes, log_days, log_max_bytes, every_minutes; 0 is no limit."""
        return cast("dict[str, Any]", self._call("PATCH", _RETENTION, json=fields)[1])

    def run_retention(self, *, dry_run: bool) -> dict[str, Any]:
        """One run. Its `state` is `queued` or `running` when it takes longer than the API waits."""
        return cast("dict[str, Any]", self._call("POST", _RETENTION, json={"dry_run": dry_run})[1])

    def retention_runs(self, *, limit: int = 50) -> dict[str, Any]:
        """Runs with their reports, newest first."""
        return self._get(f"{_RETENTION}runs/", {"limit": str(limit)})

    def pins(self, *, limit: int = 100) -> dict[str, Any]:
        """Flows that retention leaves alone."""
        return self._get(f"{_RETENTION}pins/", {"limit": str(limit)})

    def pin(self, reference: int | str) -> dict[str, Any]:
        """Pins a flow, by id or flow_id."""
        return cast("dict[str, Any]", self._call("PUT", f"{_RETENTION}pins/{reference}/")[1])

    def unpin(self, reference: int | str) -> None:
        self._call("DELETE", f"{_RETENTION}pins/{reference}/")

    def rules(self) -> list[dict[str, Any]]:
        """The payload rules, the newest first."""
        return cast("list[dict[str, Any]]", self._call("GET", "/interceptor/api/payload-rules/")[1])

    def each_dead_letter(self, **filters: Any) -> Iterator[DeadLetter]:
        """All that match, newest first, fetched page by page as they are consumed. Filters: topic, reason, state."""
        query = {name: _text(value) for name, value in filters.items() if value not in (None, "")}
        query["limit"] = str(_PAGE)
        while True:
            page = self._get(_DEAD_LETTERS, query)
            yield from page["dead_letters"]
            if page["next_cursor"] is None:
                return
            query["cursor"] = str(page["next_cursor"])

    def dead_letter(self, letter_id: int) -> DeadLetter:
        """One with its bytes and, where it is MessagePack, its contents."""
        return cast(DeadLetter, self._get(f"{_DEAD_LETTERS}{letter_id}/"))

    def redrive_dead_letter(self, letter_id: int) -> DeadLetter:
        """Puts it through ingest again; its state tells when that is done."""
        return cast(DeadLetter, self._call("POST", f"{_DEAD_LETTERS}{letter_id}/redrive/")[1])

    def redrive_dead_letters(self, *, after: int = 0, **filters: str) -> dict[str, Any]:
        """Puts those that match through ingest again, as many as one call takes: `queued`, `more`, `last_id`,
        `too_large`. Filters: topic, reason, state (new unless given); `after` an id."""
        return cast(
            "dict[str, Any]", self._call("POST", f"{_DEAD_LETTERS}redrive/", json=filters | {"after": after})[1]
        )

    def discard_dead_letter(self, letter_id: int) -> None:
        self._call("DELETE", f"{_DEAD_LETTERS}{letter_id}/")

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return cast("dict[str, Any]", self._call("GET", path, params=dict(query or {}))[1])

    def _call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        try:
            response = self._http.request(method, self.api_url + path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                f"the API at {self.api_url} cannot be reached ({str(error) or type(error).__name__}); "
                "start it with `megido up` (`make run` in a checkout), or name another with --api-url"
            ) from error
        if response.status_code == 204:
            return 204, None
        try:
            document = response.json()
        except ValueError:
            document = None
        if response.is_success and isinstance(document, dict | list):
            return response.status_code, document
        raise _refused(self.api_url, response.status_code, document)


_DEAD_LETTERS = "/proxy/api/dead-letters/"
_LOGS = "/proxy/api/logs/"
_RETENTION = "/proxy/api/retention/"


def _config_path(scope: str) -> str:
    return "/proxy/api/config/" if scope == "global" else f"/proxy/api/config/{quote(scope, safe=':')}/"


def _refused(api_url: str, status: int, document: Any) -> ApiError:
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict):
        return ApiError(status, str(error.get("code", "")), str(error.get("message", f"status {status}")))
    return ApiError(status, "", f"{api_url} answered {status}, which is no answer of a Megido API; check --api-url")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
