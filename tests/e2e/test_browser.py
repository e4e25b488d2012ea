"""A real Chromium loads a site over HTTPS through the proxy, trusting its certificate authority by key."""

import base64
import hashlib
import shutil
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from playwright.async_api import async_playwright

from tests.e2e.stack import Stack
from tests.support.site import RESOURCES, Site
from tests.support.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.browser]


def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "the browser tests need a Chromium (scripts/browser.sh)"
    return found


def key_hash(certificate: Path) -> str:
    """What Chromium's --ignore-certificate-errors-spki-list wants."""
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(spki).digest()).decode()


async def test_chromium_loads_a_site_and_every_resource_is_recorded_once(stack: Stack, site: Site) -> None:
    host = f"127.0.0.1:{site.https_port}"  # of this test alone: the others say localhost
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium(),
            args=[
                "--no-sandbox",
                "--disable-quic",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                f"--proxy-server={stack.proxy}",
                "--proxy-bypass-list=<-loopback>",
                f"--ignore-certificate-errors-spki-list={key_hash(stack.ca)}",
            ],
        )
        try:
            page = await browser.new_page()
            await page.goto(f"https://{host}/")
            await page.wait_for_function("document.title === 'loaded'")
            assert await page.text_content("#out") == "data arrived"
        finally:
            await browser.close()

    def paths() -> Counter[str]:
        found = stack.requests(f"https://{host}/")
        assert all(flow["protocol"] == "HTTPS" for flow in found)
        ended = Counter(urlsplit(flow["url"]).path for flow in found if flow["status_code"] == 200)
        return ended if set(ended) >= RESOURCES else Counter()

    recorded = until(paths, "every resource in the API")
    assert {path: recorded[path] for path in RESOURCES} == dict.fromkeys(RESOURCES, 1)
    logged = [entry["url"] for entry in stack.log_files("requests") if entry["url"].startswith(f"https://{host}/")]
    assert len(logged) == len(set(logged))
