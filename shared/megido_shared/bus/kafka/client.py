"""What all uses of the Kafka client have in common: settings, deadlines, errors, its log."""

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

from aiokafka.errors import (
    AuthenticationFailedError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
)

from megido_shared.errors import ConfigurationError, Unavailable

CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 5.0
MAX_REQUEST_BYTES = 4 << 20

SECURITY_PREFIX = "MEGIDO_KAFKA_"
SECURITY_SETTINGS = (
    "SECURITY_PROTOCOL",
    "SASL_MECHANISM",
    "SASL_USERNAME",
    "SASL_PASSWORD",
    "CA_FILE",
    "CERT_FILE",
    "KEY_FILE",
)


def security_from_env(env: Mapping[str, str]) -> dict[str, str]:
    """MEGIDO_KAFKA_SECURITY_PROTOCOL (PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL), …_SASL_MECHANISM, …_SASL_USERNAME,
    …_SASL_PASSWORD, …_CA_FILE, …_CERT_FILE, …_KEY_FILE, under the names without the prefix."""
    return {name: env[SECURITY_PREFIX + name] for name in SECURITY_SETTINGS if env.get(SECURITY_PREFIX + name)}


def client_options(bootstrap: str, security: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of every client. Raises ConfigurationError on settings that cannot work."""
    protocol = security.get("SECURITY_PROTOCOL", "PLAINTEXT")
    options: dict[str, Any] = {"bootstrap_servers": bootstrap, "client_id": "megido", "security_protocol": protocol}
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise ConfigurationError(f"MEGIDO_KAFKA_SECURITY_PROTOCOL cannot be {protocol}; SASL_SSL is the usual one")
    if protocol.startswith("SASL"):
        options["sasl_mechanism"] = security.get("SASL_MECHANISM", "SCRAM-SHA-512")
        options["sasl_plain_username"] = security.get("SASL_USERNAME")
        options["sasl_plain_password"] = security.get("SASL_PASSWORD")
        if not (options["sasl_plain_username"] and options["sasl_plain_password"]):
            raise ConfigurationError(f"{protocol} needs MEGIDO_KAFKA_SASL_USERNAME and MEGIDO_KAFKA_SASL_PASSWORD")
    if protocol.endswith("SSL"):
        options["ssl_context"] = _ssl_context(security)
    return options


def _ssl_context(security: Mapping[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=security.get("CA_FILE"))
        if certificate := security.get("CERT_FILE"):
            context.load_cert_chain(certificate, security.get("KEY_FILE"))
    except OSError as error:
        raise ConfigurationError(f"Kafka's certificates cannot be read: {error} (MEGIDO_KAFKA_CA_FILE, …)") from error
    return context


async def within[T](seconds: float, call: Awaitable[T], doing: str) -> T:
    """Awaits a call of the client under a deadline of ours. Raises Unavailable with the reason."""
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError as error:
        raise Unavailable(f"Kafka: {doing} took longer than {seconds:.0f} s") from error
    except (KafkaError, OSError) as error:
        raise Unavailable(f"Kafka: {doing}: {reason(error)}") from error


async def ended(stop: Coroutine[Any, Any, object], seconds: float = CLOSE_SECONDS) -> bool:
    """Whether a `stop` or `close` of the client came to its end in time. With the broker away these hang, raise, or
    (the consumer's) end in a CancelledError of a task within."""
    stopping = asyncio.create_task(stop)
    done, _ = await asyncio.wait([stopping], timeout=seconds)
    if not done:
        stopping.cancel()
        await asyncio.wait([stopping], timeout=1.0)
    return bool(done) and not stopping.cancelled() and stopping.exception() is None


def reason(error: BaseException) -> str:
    """One line that a person can act on."""
    if isinstance(error, KafkaConnectionError):
        error = _sparse.why(str(error)) or error
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the broker's certificate is not trusted ({error.verify_message}); see MEGIDO_KAFKA_CA_FILE"
    if isinstance(error, AuthenticationFailedError | SaslAuthenticationFailed) or "auth" in str(error).lower():
        return f"the user name or the password was refused ({error})"
    if isinstance(error, KafkaConnectionError):
        return f"no broker answered as expected; is it up, and is MEGIDO_KAFKA_SECURITY_PROTOCOL right? ({error})"
    return f"{type(error).__name__}: {error}"


class _Sparse(logging.Filter):
    """Lets one record of a kind through every 30 s: a client without its broker logs dozens of lines a second. Why a
    connect failed is told in the log only, so it is kept from there."""

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._last: dict[str, tuple[float, int]] = {}
        self._failed: dict[str, BaseException] = {}

    def why(self, text: str) -> BaseException | None:
        """Why the last connect to one of the addresses in an error's text failed."""
        return next((error for address, error in self._failed.items() if address in text), None)

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple) and len(record.args) == 3:
            host, port, error = record.args
            if isinstance(error, BaseException):
                self._failed[repr((host, port))[:-1]] = error.with_traceback(None)
        now = time.monotonic()
        kind = f"{record.name}:{record.msg}"
        since, held_back = self._last.get(kind, (-self._seconds, 0))
        if now - since < self._seconds:
            self._last[kind] = (since, held_back + 1)
            return False
        self._last[kind] = (now, 0)
        if held_back:
            record.msg = f"{record.msg} ({held_back} more like this in between)"
        return True


_sparse = _Sparse()


def quieten() -> None:
    """Puts the filter on each logger of the client; again is fine. A filter on a parent logger would not do."""
    for name in list(logging.root.manager.loggerDict):
        if name == "aiokafka" or name.startswith("aiokafka."):
            logging.getLogger(name).addFilter(_sparse)
