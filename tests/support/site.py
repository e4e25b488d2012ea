"""A small site with several resources, an echo, a WebSocket, over HTTP and HTTPS, in a thread of its own.

HTTPS speaks HTTP/1.1 (aiohttp); `H2Site` speaks HTTP/2.
"""

import asyncio
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import h2.config
import h2.connection
import h2.events
import trustme
from aiohttp import WSMsgType, web

PAGE = """<!doctype html><html><head><title>Megido test site</title>
<link rel="stylesheet" href="/style.css"><script src="/app.js" defer></script></head>
<body><h1>Hello</h1><img src="/logo.svg" alt="logo"><p id="out">waiting</p></body></html>"""
SCRIPT = """fetch('/api/data?x=1').then(r => r.json()).then(d => {
  document.getElementById('out').textContent = d.message; document.title = 'loaded'; });"""
LOGO = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40"><circle cx="20" cy="20" r="18"/></svg>'
RESOURCES = {"/", "/style.css", "/app.js", "/logo.svg", "/api/data"}


class InThread:
    """Runs an asyncio server in a thread. `start` returns when it listens."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


def server_context(authority: trustme.CA, *names: str, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


class Site:
    """`http_port`, `https_port`; `received` counts what reached the server, by path with its query."""

    def __init__(self, authority: trustme.CA) -> None:
        self._thread = InThread()
        self.received: list[tuple[str, str]] = []
        self._runner: web.AppRunner
        self.http_port, self.https_port = self._thread.run(self._start(authority))

    async def _start(self, authority: trustme.CA) -> tuple[int, int]:
        app = web.Application(middlewares=[self._count])
        text = _text
        app.router.add_get("/", text(PAGE, "text/html"))
        app.router.add_get("/style.css", text("h1 { color: teal }", "text/css"))
        app.router.add_get("/app.js", text(SCRIPT, "text/javascript"))
        app.router.add_get("/logo.svg", text(LOGO, "image/svg+xml"))
        app.router.add_get("/favicon.ico", text("", "image/x-icon"))
        app.router.add_get("/api/data", text('{"message": "data arrived"}', "application/json"))
        app.router.add_get("/ws", _echo_websocket)
        app.router.add_route("*", "/echo", _echo)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        plain = web.TCPSite(self._runner, "127.0.0.1", 0)
        await plain.start()
        secure = web.TCPSite(
            self._runner, "127.0.0.1", 0, ssl_context=server_context(authority, "localhost", "127.0.0.1")
        )
        await secure.start()
        return self._runner.addresses[0][1], self._runner.addresses[1][1]

    @web.middleware
    async def _count(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.received.append((request.method, request.path_qs))
        answer: web.StreamResponse = await handler(request)
        return answer

    def close(self) -> None:
        self._thread.run(self._runner.cleanup())
        self._thread.close()


def _text(content: str, content_type: str) -> Callable[[web.Request], Any]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=content, content_type=content_type, charset="utf-8")

    return answer


async def _echo(request: web.Request) -> web.Response:
    body = await request.read()
    headers = {"X-Method": request.method, "Content-Type": request.headers.get("Content-Type", "text/plain")}
    return web.Response(body=body, headers=headers)


async def _echo_websocket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type == WSMsgType.TEXT:
            await socket.send_str("echo " + message.data)
        elif message.type == WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


class H2Site:
    """Answers every HTTP/2 request with its own path as text."""

    def __init__(self, authority: trustme.CA) -> None:
        self._thread = InThread()
        self._context = server_context(authority, "localhost", "127.0.0.1", alpn=("h2",))
        self._server, self.port = self._thread.run(self._start())

    async def _start(self) -> tuple[asyncio.Server, int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        return server, server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        while data := await reader.read(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    path = dict(event.headers)[":path"].encode()
                    headers = [(":status", "200"), ("content-type", "text/plain"), ("content-length", str(len(path)))]
                    connection.send_headers(event.stream_id, headers)
                    connection.send_data(event.stream_id, path, end_stream=True)
            writer.write(connection.data_to_send())
            await writer.drain()
        writer.close()

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()

        self._thread.run(stop())
        self._thread.close()
