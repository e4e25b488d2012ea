"""The certificate at `http://mitm.it`, without the web framework that mitmproxy's own page brings along."""

from html import escape
from pathlib import Path

from mitmproxy import addonmanager, ctx, http

from megido_capture.authority import BASENAME

_FILES = {
    "/cert/pem": ("pem", "application/x-x509-ca-cert"),
    "/cert/cer": ("cer", "application/x-x509-ca-cert"),
    "/cert/p12": ("p12", "application/x-pkcs12"),
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Megido: trust the certificate</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem}}</style></head>
<body><h1>This traffic goes through Megido</h1>
<p>To record HTTPS, the client must trust this node's certificate authority:</p>
<ul><li><a href="/cert/pem">PEM</a> (Linux, macOS, Firefox, curl)</li>
<li><a href="/cert/cer">CER</a> (Android)</li>
<li><a href="/cert/p12">P12</a> (Windows)</li></ul>
<p>With curl: <code>curl -x http://{proxy} http://{host}/cert/pem -o megido-ca.pem</code>, then
<code>curl --cacert megido-ca.pem -x http://{proxy} https://example.com/</code></p></body></html>
"""


class Onboarding:
    name = "onboarding"

    def load(self, loader: addonmanager.Loader) -> None:
        loader.add_option("onboarding", bool, True, "Serve the certificate at onboarding_host.")
        loader.add_option("onboarding_host", str, "mitm.it", "The name under which the certificate is served.")

    def __init__(self) -> None:
        self._host = "mitm.it"
        self._directory = Path()

    def configure(self, updated: set[str]) -> None:
        """The options are kept: reading one costs more than all else that `request` does."""
        self._host = ctx.options.onboarding_host if ctx.options.onboarding else ""
        self._directory = Path(ctx.options.confdir).expanduser()

    def request(self, flow: http.HTTPFlow) -> None:
        if flow.request.host == self._host and flow.response is None and self._host:
            flow.response = self._answer(flow)

    def _answer(self, flow: http.HTTPFlow) -> http.Response:
        path = flow.request.path.partition("?")[0]
        if path == "/":
            proxy = "{}:{}".format(*flow.client_conn.sockname[:2])
            page = _PAGE.format(proxy=escape(proxy), host=escape(self._host))
            return http.Response.make(200, page, {"Content-Type": "text/html; charset=utf-8"})
        if path not in _FILES:
            return http.Response.make(404, "try /\n", {"Content-Type": "text/plain"})
        extension, media_type = _FILES[path]
        name = f"{BASENAME}-ca-cert.{extension}"
        try:
            content = (self._directory / name).read_bytes()
        except OSError:
            return http.Response.make(404, "the certificate is not there\n", {"Content-Type": "text/plain"})
        headers = {"Content-Type": media_type, "Content-Disposition": f'attachment; filename="{name}"'}
        return http.Response.make(200, content, headers)
