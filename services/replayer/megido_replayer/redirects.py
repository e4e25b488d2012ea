"""Following a redirect, as far as a job asks for it: what the next request is. No I/O."""

from dataclasses import replace
from urllib.parse import urljoin

from megido_replayer.prepare import Prepared
from megido_replayer.target import BadTarget, Target, parse
from megido_replayer.transport import RawResponse

_ANY_METHOD = frozenset((307, 308))
_REDIRECTS = frozenset((301, 302, 303)) | _ANY_METHOD
_CREDENTIALS = frozenset((b"authorization", b"cookie"))
_OF_THE_BODY = frozenset((b"content-length", b"content-type", b"content-encoding", b"transfer-encoding"))


def next_request(sent: Prepared, response: RawResponse) -> Prepared | None:
    """The request that the answer leads to; None when it is no redirect or one that cannot be followed.

    As browsers do: 303, and 301 and 302 after POST, go on with GET and no body. Credentials stay with the origin
    that they were sent to.
    """
    if response.status not in _REDIRECTS:
        return None
    location = next((value for name, value in response.headers if name.lower() == b"location"), None)
    if location is None:
        return None
    try:
        to = parse(urljoin(_url(sent.to), location.decode("latin-1").partition("#")[0]))
    except (BadTarget, ValueError):
        return None
    request = sent.request
    headers = [(name, to.authority if name.lower() == b"host" else value) for name, value in request.headers]
    if (to.scheme, to.host, to.port) != (sent.to.scheme, sent.to.host, sent.to.port):
        headers = [pair for pair in headers if pair[0].lower() not in _CREDENTIALS]
    changed = replace(request, target=to.target, headers=headers)
    if _becomes_get(request.method, response.status):
        kept = [pair for pair in headers if pair[0].lower() not in _OF_THE_BODY]
        changed = replace(changed, method=b"GET", headers=kept, body=b"", trailers=())
    return Prepared(changed, to, "", (*sent.deviations, "redirect followed"))


def _becomes_get(method: bytes, status: int) -> bool:
    if status == 303:
        return method not in (b"GET", b"HEAD")
    return status not in _ANY_METHOD and method == b"POST"


def _url(to: Target) -> str:
    return f"{to.scheme}://{to.authority.decode()}{to.target.decode('latin-1')}"
