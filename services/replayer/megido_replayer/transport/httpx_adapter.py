"""httpx's transport interface over the sender: `httpx.AsyncClient(transport=SenderTransport(...))`.

What httpx itself adds to a request (Host, Accept, User-Agent …) is up to its caller: build `httpx.Request` with
the headers that are meant, and give a raw path as `extensions={"target": b"…"}`. The client must have
`trust_env=False`, its redirects off and no cookie jar where bytes matter.
"""

from collections.abc import Awaitable, Callable
from typing import cast

import httpx

from megido_replayer.transport.messages import Origin, RawRequest, RawResponse, SendError, Unsendable
from megido_replayer.transport.sender import DEFAULT_MAX_BODY, Sender
from megido_shared.events import ErrorType

type Locate = Callable[[str, str, int], Awaitable[Origin]]
"""(scheme, host, port) → where to connect; refuses by raising. `addresses.Gate` decides in the service."""

DEFAULT_TIMEOUT_S = 30.0


class SenderTransport(httpx.AsyncBaseTransport):
    """The whole answer is read, up to `max_body` bytes, before it is returned; `extensions["raw"]` is the
    `RawResponse` with true size, truncation, trailers, timing. The request's largest httpx timeout bounds it as
    a whole. Errors are httpx's own, with the `SendError` as their cause."""

    def __init__(self, sender: Sender, locate: Locate, *, max_body: int = DEFAULT_MAX_BODY) -> None:
        self._sender = sender
        self._locate = locate
        self._max_body = max_body

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        raw = RawRequest(
            method=request.method.encode("ascii"),
            target=request.extensions.get("target", url.raw_path),
            headers=request.headers.raw,
            body=await request.aread(),
        )
        origin = await self._locate(url.scheme, url.host, url.port or {"http": 80, "https": 443}[url.scheme])
        try:
            answer = await self._sender.send(raw, origin, timeout_s=_timeout(request), max_body=self._max_body)
        except Unsendable as error:
            raise httpx.LocalProtocolError(str(error), request=request) from error
        except SendError as error:
            raise _translated(error, request) from error
        return _response(answer)

    async def aclose(self) -> None:
        self._sender.close()


def _timeout(request: httpx.Request) -> float:
    """httpx has no bound for the whole; None anywhere means that its caller wants none of its parts bounded."""
    given = cast(dict[str, float | None], request.extensions.get("timeout", {}))
    return max((value for value in given.values() if value is not None), default=DEFAULT_TIMEOUT_S)


def _translated(error: SendError, request: httpx.Request) -> httpx.TransportError:
    kind: type[httpx.TransportError]
    match error.error_type:
        case ErrorType.TIMEOUT:
            kind = httpx.ReadTimeout if error.sent else httpx.ConnectTimeout
        case ErrorType.PROTOCOL_ERROR:
            kind = httpx.RemoteProtocolError
        case _:
            kind = httpx.ReadError if error.sent else httpx.ConnectError
    return kind(str(error), request=request)


def _response(answer: RawResponse) -> httpx.Response:
    extensions = {
        "http_version": answer.http_version.encode(),
        "reason_phrase": answer.reason,
        "raw": answer,
    }
    return httpx.Response(
        answer.status, headers=answer.headers, stream=httpx.ByteStream(answer.body), extensions=extensions
    )
