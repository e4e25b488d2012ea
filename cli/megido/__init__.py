"""The `megido` command, its Python client, and the launcher that runs every service on one machine.

import megido
with megido.Client() as client:
    for request in client.requests(method="POST", limit=10)["requests"]:
        print(request["id"], request["url"])
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megido.client import ApiError, Client
    from megido_shared.logfiles import ProxyLogger

__all__ = ["ApiError", "Client", "ProxyLogger"]


def __getattr__(name: str) -> object:
    """Imported on first use: the HTTP client takes longer to load than `megido --help` may."""
    if name == "ProxyLogger":
        from megido_shared.logfiles import ProxyLogger  # noqa: PLC0415

        return ProxyLogger
    if name in __all__:
        from megido import client  # noqa: PLC0415

        return getattr(client, name)
    raise AttributeError(f"module 'megido' has no attribute {name!r}")
