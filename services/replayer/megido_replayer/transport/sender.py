"""`Sender.send`: one request, one answer, within one deadline."""

import time
from dataclasses import dataclass

from megido_replayer.transport import wire
from megido_replayer.transport.connection import Connection, ConnectionTrouble
from megido_replayer.transport.messages import SAFE_METHODS, Origin, RawRequest, RawResponse, SendError
from megido_replayer.transport.pool import Pool
from megido_replayer.transport.tls import TlsContexts
from megido_shared.events import ErrorType

DEFAULT_MAX_BODY = 1 << 20

_ERROR_TYPES = {
    "closed": ErrorType.CONNECTION_RESET,
    "reset": ErrorType.CONNECTION_RESET,
    "protocol": ErrorType.PROTOCOL_ERROR,
    "timeout": ErrorType.TIMEOUT,
}


class Sender:
    """Sends requests as they are: no proxies, no redirects, no cookies, nothing added.

    Connections are kept and used again, but only for methods that are safe to repeat (`SAFE_METHODS`): a server
    may close a kept connection in the instant in which a request is written, and then nobody can tell whether the
    request was acted upon. Such a request is sent again, on another connection; any other method gets a fresh
    connection and is written once.
    """

    def __init__(self, tls: TlsContexts | None = None, *, connect_timeout_s: float = 10.0) -> None:
        self._pool = Pool(tls or TlsContexts(), connect_timeout_s=connect_timeout_s)

    async def send(
        self, request: RawRequest, origin: Origin, *, timeout_s: float = 30.0, max_body: int = DEFAULT_MAX_BODY
    ) -> RawResponse:
        """Returns a whole answer, of which at most `max_body` bytes of the body are stored.

        `timeout_s` bounds everything, connecting included. Raises Unsendable (nothing was sent) and SendError,
        which says what kind of failure it was, whether the request may have arrived, and what came back.
        """
        return await self.send_wire(wire.render(request), origin, timeout_s=timeout_s, max_body=max_body)

    async def send_wire(
        self, message: wire.Wire, origin: Origin, *, timeout_s: float = 30.0, max_body: int = DEFAULT_MAX_BODY
    ) -> RawResponse:
        """The same for a request that was rendered before."""
        return await self._send(_Exchange(message, origin, max_body, time.monotonic(), timeout_s))

    def close(self) -> None:
        """Closes the kept connections. Exchanges under way are the caller's to cancel."""
        self._pool.close()

    async def _send(self, exchange: "_Exchange") -> RawResponse:
        try:
            if exchange.message.method in SAFE_METHODS:
                while (kept := self._pool.take(exchange.origin)) is not None:
                    try:
                        return await self._exchange(kept, exchange)
                    except ConnectionTrouble as trouble:
                        if not trouble.stale:
                            raise
            return await self._exchange(await self._pool.connect(exchange.origin, exchange.timeout_s), exchange)
        except ConnectionTrouble as trouble:
            within = f" ({exchange.timeout_s:g} s)" if trouble.kind == "timeout" else ""
            raise exchange.failure(_ERROR_TYPES[trouble.kind], str(trouble) + within) from trouble

    async def _exchange(self, connection: Connection, exchange: "_Exchange") -> RawResponse:
        exchange.connection = connection
        message = exchange.message
        await connection.exchange(
            message.data,
            head_request=message.method == b"HEAD",
            keep_alive=message.keep_alive,
            max_body=exchange.max_body,
            timeout_s=exchange.started + exchange.timeout_s - time.monotonic(),
        )
        response = exchange.response()
        assert response is not None
        self._pool.give_back(exchange.origin, connection)
        return response


@dataclass(slots=True)
class _Exchange:
    """One send, and how far it is, for the error that may end it."""

    message: wire.Wire
    origin: Origin
    max_body: int
    started: float
    timeout_s: float
    connection: Connection | None = None

    @property
    def sent(self) -> bool:
        return self.connection is not None and self.connection.exchanges > 0

    def response(self) -> RawResponse | None:
        assert self.connection is not None
        return self.connection.response(self.started, self.message.deviations)

    def failure(self, error_type: ErrorType, message: str) -> SendError:
        connection = self.connection
        if connection is None:
            return SendError(error_type, message)
        return SendError(
            error_type,
            message,
            sent=self.sent,
            response=self.response(),
            timing=connection.timing(self.started),
            client=connection.client,
            server=connection.server,
        )
