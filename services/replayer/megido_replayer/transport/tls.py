"""TLS towards targets: verified against the system's and certifi's authorities, or deliberately not."""

import ssl
from pathlib import Path

import certifi

from megido_shared.errors import ConfigurationError


class TlsContexts:
    """One context for each choice, made when first used: loading the authorities takes 20 ms."""

    def __init__(self, ca_file: Path | None = None) -> None:
        """`ca_file` (PEM) adds authorities, as of a company or a test."""
        self._ca_file = ca_file
        self._made: dict[bool, ssl.SSLContext] = {}

    def get(self, verify: bool) -> ssl.SSLContext:
        """Raises ConfigurationError when `ca_file` cannot be loaded."""
        context = self._made.get(verify)
        if context is None:
            context = self._made[verify] = self._verifying() if verify else _trusting()
            context.set_alpn_protocols(["http/1.1"])
        return context

    def _verifying(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        # Strict RFC 5280 refuses private authorities that every browser takes (no key usage extension).
        context.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_STRICT
        context.load_verify_locations(certifi.where())
        if self._ca_file is not None:
            try:
                context.load_verify_locations(self._ca_file)
            except (OSError, ssl.SSLError) as error:
                raise ConfigurationError(
                    f"certificate authorities cannot be loaded from {self._ca_file}: {error}"
                ) from error
        return context


def _trusting() -> ssl.SSLContext:
    """Takes any certificate, and the old protocols and ciphers that the servers with such certificates speak."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context
