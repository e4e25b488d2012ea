"""Posted requests and responses as events. Pure: ids and times come in."""

import re

from megido_api.flows.schemas import PostedRequest, PostedResponse
from megido_api.problems import bad_field
from megido_api.publishing import Identity
from megido_shared import events

_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://[^/?#]*(.*)", re.DOTALL)
_SCHEMES = {"http", "https", "ws", "wss"}


def started(posted: PostedRequest, number: int, flow_id: bytes, identity: Identity) -> events.FlowStarted:
    """Raises Problem (400) on a URL that is neither absolute nor a path."""
    scheme, target = _parse_url(posted)
    return events.FlowStarted(
        **identity,
        source_app=posted.source_app or "",
        flow_id=flow_id,
        posted_id=number,
        client=events.Peer(ip=posted.source_ip or ""),
        request=events.Request(
            method=posted.method.encode(),
            scheme=scheme,
            host=posted.host,
            port=posted.port,
            target=target.encode(),
            headers=events.pack_headers(_with_user_agent(posted)),
            body=_body(posted.body, posted.request_size),
        ),
    )


def completed(posted: PostedResponse, start: events.FlowStarted, identity: Identity) -> events.FlowCompleted:
    """The terminal event of a posted request: the same flow, with its response."""
    duration = -1 if posted.response_time is None else round(posted.response_time * 1000)
    return events.FlowCompleted(
        **(identity | {"time_us": start.time_us}),
        source_app=start.source_app,
        flow_id=start.flow_id,
        posted_id=start.posted_id,
        client=start.client,
        request=start.request,
        response=events.Response(
            status=posted.status_code,
            headers=events.pack_headers(posted.headers),
            body=_body(posted.body, posted.response_size),
        ),
        timing=events.Timing(response_us=duration),
        cached=posted.cached,
        error_message=posted.error_message or "",
    )


def _parse_url(posted: PostedRequest) -> tuple[str, str]:
    """(scheme, target). The protocol decides when it was given, otherwise the URL's scheme."""
    if posted.url.startswith("/"):
        return posted.protocol.lower(), posted.url
    found = _ABSOLUTE.fullmatch(posted.url)
    if found is None:
        raise bad_field("url", "must be an absolute URL or a path")
    scheme = found[1].lower()
    if "protocol" in posted.model_fields_set or scheme not in _SCHEMES:
        scheme = posted.protocol.lower()
    rest = found[2]
    return scheme, rest if rest.startswith("/") else "/" + rest


def _with_user_agent(posted: PostedRequest) -> list[tuple[bytes, bytes]]:
    """The headers; a user agent that was posted only beside them becomes one, or nothing would keep it."""
    pairs: list[tuple[bytes, bytes]] = posted.headers
    if posted.user_agent and not any(name.lower() == b"user-agent" for name, _ in pairs):
        return [*pairs, (b"User-Agent", posted.user_agent.encode())]
    return pairs


def _body(data: bytes, size: int | None) -> events.Body:
    """A posted size that exceeds what was posted is the true one."""
    true_size = max(size or 0, len(data))
    return events.Body(data=data, size=true_size, truncated=true_size > len(data))
