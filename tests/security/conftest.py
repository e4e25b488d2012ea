"""The fixtures of the capture tests."""

from tests.integration.capture.conftest import (  # noqa: F401 - fixtures
    authority,
    proxy,
    proxy_process,
    trusted,
    upstream,
    upstream_tls,
)
