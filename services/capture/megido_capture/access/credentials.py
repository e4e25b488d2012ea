"""What a client shows as credentials, and what is accepted. Pure: no I/O, nothing of mitmproxy.

Basic (RFC 7617) with user name and password, or with any user name and the token as password; Bearer (RFC 6750) with
the token.
"""

import hmac
import secrets
from base64 import b64decode
from dataclasses import dataclass

import argon2
from argon2.exceptions import InvalidHashError, VerificationError

from megido_capture.configuration.settings import CaptureSettings

MAX_HEADER = 8 * 1024
"""Characters of a `Proxy-Authorization` that are looked at; tokens and passwords are far below."""

BLANK = " \t"
"""White space around a field's value (RFC 9110, 5.6.3). Python knows more, which may be part of a token."""

SHOWN = 200
"""Characters of a user name that are recorded."""

MAX_COLONS = 16
"""Of a secret that was given as user name."""

SCHEMES = {
    name.lower(): name
    for name in (
        *("Digest", "NTLM", "Negotiate", "Kerberos", "HOBA", "Mutual", "OAuth", "DPoP", "GNAP", "Concealed", "vapid"),
        *("SCRAM-SHA-1", "SCRAM-SHA-256", "PrivateToken", "Token", "AWS4-HMAC-SHA256"),
    )
}
"""Those of IANA's registry and in common use. Nothing else is repeated: where the scheme was forgotten, the first word
is the secret."""

_KEY = secrets.token_bytes(32)
_hasher = argon2.PasswordHasher()


@dataclass(frozen=True, slots=True)
class Given:
    """What a `Proxy-Authorization` says. With a `problem` it holds nothing that could be compared."""

    basic: bool = False
    username: bytes = b""
    secret: bytes = b""
    problem: str = ""

    @property
    def shown(self) -> str:
        """The user name for the audit event. Empty without a password: many clients send a token as user name alone."""
        return self.username.decode("utf-8", "replace")[:SHOWN] if self.secret and not self.problem else ""

    @property
    def hidden(self) -> tuple[bytes, ...]:
        """What of it may be a secret in the wrong place: a token as user name, which may have colons of its own."""
        if not self.username:
            return ()
        parts = (self.username + b":" + self.secret).split(b":", MAX_COLONS)
        return tuple(b":".join(parts[:count]) for count in range(1, len(parts) + 1))


def parse(header: str | None) -> Given:
    """`header` as mitmproxy gives it: decoded with surrogateescape, several fields joined by commas."""
    if not header:
        return Given(problem="no credentials")
    if len(header) > MAX_HEADER:
        return Given(problem="credentials too long")
    scheme, _, value = header.strip(BLANK).partition(" ")
    raw = value.strip(BLANK).encode("utf-8", "surrogateescape")
    match scheme.lower():
        case "bearer":
            return Given(secret=raw, problem="" if raw else "no token")
        case "basic":
            return _basic(raw)
        case _:
            return Given(problem=f"unsupported scheme {SCHEMES.get(scheme.lower(), '')}".rstrip())


def _basic(encoded: bytes) -> Given:
    try:
        username, colon, password = b64decode(encoded, validate=True).partition(b":")
    except ValueError:
        return Given(problem="malformed Basic credentials")
    return Given(basic=True, username=username, secret=password, problem="" if colon else "no password")


def keyed(*parts: bytes) -> bytes:
    """A hash with a key that only this process has: what is remembered of a secret."""
    return hmac.digest(_KEY, b"\0".join(b"%d:%s" % (len(part), part) for part in parts), "sha256")


class Accepted:
    """The credentials that settings accept. Each has an identity, a keyed hash of what was configured: connections
    remember it, so that they can be ended when that very credential is accepted no more."""

    def __init__(self, settings: CaptureSettings) -> None:
        self._username = settings.auth_username.encode()
        self._plain: dict[bytes, tuple[bool, bytes]] = {}
        self._hashed: dict[bytes, tuple[bool, str]] = {}
        for kind, plain, hashed in (
            (b"token", settings.auth_token, settings.auth_token_hash),
            (b"password", settings.auth_password, settings.auth_password_hash),
        ):
            is_password = kind == b"password"
            name = self._username if is_password else b""
            if plain:
                self._plain[keyed(kind, name, b"plain", plain.encode())] = (is_password, keyed(plain.encode()))
            if hashed:
                self._hashed[keyed(kind, name, b"hash", hashed.encode())] = (is_password, hashed)
        self.identities = frozenset(self._plain) | frozenset(self._hashed)

    def compare(self, given: Given) -> bytes:
        """The identity of the plain credential that was given, or empty. Takes the same time either way."""
        named, secret, found = self._is_named(given), keyed(given.secret), b""
        for identity, (is_password, wanted) in self._plain.items():
            if hmac.compare_digest(secret, wanted) and (named or not is_password):
                found = identity
        return found

    @property
    def compares(self) -> bool:
        """Whether some of them are plain."""
        return bool(self._plain)

    def holds(self, text: bytes) -> bool:
        """Whether `text` is one of the plain secrets."""
        found = keyed(text)
        return True in [hmac.compare_digest(found, wanted) for _, wanted in self._plain.values()]

    def needs_hashing(self, given: Given) -> bool:
        """Whether a hash could be meant. A wrong user name costs the same hashing as a right one."""
        return any(given.basic or not is_password for is_password, _ in self._hashed.values())

    def memory_key(self, given: Given) -> bytes:
        """Under which the outcome of hashing is remembered: the same for all user names that make no difference."""
        return keyed(b"basic" if given.basic else b"bearer", b"named" if self._is_named(given) else b"", given.secret)

    def verify(self, given: Given) -> bytes:
        """The identity of the hashed credential that was given, or empty. Takes a few hundred milliseconds of
        processor time for each hash: for a thread."""
        named, found = self._is_named(given), b""
        for identity, (is_password, wanted) in self._hashed.items():
            if is_password and not given.basic:
                continue
            if matches(wanted, given.secret) and (named or not is_password):
                found = identity
        return found

    def _is_named(self, given: Given) -> bool:
        right = hmac.compare_digest(keyed(given.username), keyed(self._username))
        return given.basic and (right or not self._username)


def matches(wanted: str, secret: bytes) -> bool:
    """Whether `secret` is the one that the PHC string was made of. A string that cannot be read matches nothing."""
    try:
        return _hasher.verify(wanted, secret)
    except (VerificationError, InvalidHashError):
        return False
