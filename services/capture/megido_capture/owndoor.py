"""The addon that keeps clients from reaching Megido's own API through the proxy (the class of CVE-2025-23217)."""

from urllib.parse import urlsplit

from mitmproxy.proxy import server_hooks

from megido_capture.access import is_loopback

_ANY_ADDRESS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - as a destination they lead to this machine


class OwnDoor:
    name = "megido-own-door"

    def __init__(self, api_url: str) -> None:
        url = urlsplit(api_url)
        self._host = (url.hostname or "").lower()
        self._port = url.port or (443 if url.scheme == "https" else 80)

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """By name and address; a foreign name that resolves to this machine is not recognised here."""
        if data.server.address is None or data.server.address[1] != self._port:
            return
        host = data.server.address[0].lower()
        if host == self._host or (_leads_here(self._host) and _leads_here(host)):
            data.server.error = f"{host}:{self._port} is Megido's own API (api_url) and not reachable through the proxy"


def _leads_here(host: str) -> bool:
    return is_loopback(host) or host in _ANY_ADDRESS
