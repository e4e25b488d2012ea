"""A real Chromium's WebSockets, over TLS and compressed, as its pages see them end."""

import asyncio
import base64
import hashlib
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.async_api import Page, async_playwright
from websockets.asyncio.server import ServerConnection, serve

from megido_shared.events import WebSocketMessage
from tests.integration.capture.conftest import server_context
from tests.integration.capture.harness import Proxy, flows

pytestmark = pytest.mark.browser

TALK = """([url, say]) => new Promise(done => {
    const heard = [], socket = new WebSocket(url, ["chat"]);
    socket.onopen = () => say.forEach(text => socket.send(text));
    socket.onmessage = event => { heard.push(event.data); if (event.data === "over") socket.close(3001, "thanks"); };
    socket.onclose = event =>
        done([heard, socket.protocol, socket.extensions, event.code, event.reason, event.wasClean]);
})"""


@pytest.fixture
async def page(proxy: Proxy) -> AsyncIterator[Page]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "the browser tests need a Chromium (scripts/browser.sh)"
    key = x509.load_pem_x509_certificate(proxy.ca.read_bytes()).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    trusted = base64.b64encode(hashlib.sha256(spki).digest()).decode()
    arguments = ["--no-sandbox", "--disable-quic", "--disable-background-networking", "--no-first-run"]
    arguments += [f"--proxy-server={proxy.url}", "--proxy-bypass-list=<-loopback>"]
    arguments.append(f"--ignore-certificate-errors-spki-list={trusted}")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=arguments)
        try:
            yield await browser.new_page()
        finally:
            await browser.close()


async def answer(connection: ServerConnection) -> None:
    async for message in connection:
        if message == "cut me":
            connection.transport.abort()
        else:
            await connection.send(message)


async def test_a_page_talks_and_learns_how_it_ended(proxy: Proxy, authority: trustme.CA, page: Page) -> None:
    long = "compressible, " * 2000
    tls = server_context(authority, "localhost")
    async with serve(answer, "127.0.0.1", 0, ssl=tls, subprotocols=["chat"]) as server:
        url = f"wss://localhost:{next(iter(server.sockets)).getsockname()[1]}/page"
        async with asyncio.timeout(60):
            ended = await page.evaluate(TALK, [url, [long, "over"]])
            lost = await page.evaluate(TALK, [url, ["cut me"]])
    assert ended[0] == [long, "over"] and ended[1] == "chat" and "permessage-deflate" in ended[2]
    assert ended[3:] == [3001, "thanks", True]
    assert lost[3:] == [1006, "", False], "a page connects again only when it knows that the connection was lost"
    found = await proxy.until(lambda events: len(closes(events)) == 2)
    texts = [m.payload.decode() for m in flows(found, WebSocketMessage) if m.message_type == "TEXT"]
    assert sorted(texts) == sorted([long, long, "over", "over", "cut me"])
    assert [(m.close_code, m.close_reason, m.direction) for m in closes(found)] == [
        (3001, "thanks", "SEND"),
        (1006, "", "RECEIVE"),
    ]


def closes(found: list[Any]) -> list[WebSocketMessage]:
    return [message for message in flows(found, WebSocketMessage) if message.message_type == "CLOSE"]
