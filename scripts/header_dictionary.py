"""Trains the dictionary that stored headers are compressed with (`megido_shared/db/codecs.py`), on made-up traffic.

    .venv/bin/python scripts/header_dictionary.py compare     # bytes and µs on headers it was not trained on
    .venv/bin/python scripts/header_dictionary.py write PATH  # a new one

A dictionary that rows were stored with is never changed or removed: a new one is a new file and a new coding.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zstandard

from megido_shared import events
from megido_shared.db import codecs

type Pairs = list[tuple[str, str]]

SIZE = 16_384
ID = 1_001
TRAINING, HELD_OUT = 1, 2
_SAMPLES = 12_000
_VOCABULARY = (
    "account alpha api app asset auth basket billing bundle cart catalog chat checkout config core data delta device"
    " edge event export feed file flow graph home image import index inventory invoice item job key lambda list login"
    " main media member menu message metric model mobile news note order page panel payment photo plan player post"
    " price product profile project query queue rate report review route rule search session shop sign site static"
    " status store stream style sync table task team ticket time token trace track tree update upload user vendor video"
    " view web widget word work zone"
)
_WORDS = _VOCABULARY.split()
_TLDS = ("com", "com", "com", "org", "net", "io", "dev", "de", "co.uk", "fr", "internal")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_LANGUAGES = ("en-US,en;q=0.9", "en-GB,en;q=0.9", "en-US,en;q=0.5", "de-DE,de;q=0.9,en-US;q=0.8,en;q=0.7", "*",
              "fr-FR,fr;q=0.9,en-US;q=0.8,en;q=0.7", "es-ES,es;q=0.9,en;q=0.8", "ja,en-US;q=0.9,en;q=0.8")  # fmt: skip
_SYSTEMS = ("Windows NT 10.0; Win64; x64", "Macintosh; Intel Mac OS X 10_15_7", "X11; Linux x86_64",
            "Linux; Android 10; K", "iPhone; CPU iPhone OS 17_5 like Mac OS X")  # fmt: skip
_TYPES = ("application/json", "application/json", "application/json; charset=utf-8", "application/json;charset=UTF-8",
          "text/html; charset=utf-8", "text/html; charset=UTF-8", "text/html", "text/css", "text/css; charset=utf-8",
          "application/javascript", "text/javascript; charset=utf-8", "text/plain; charset=utf-8", "image/png",
          "image/jpeg", "image/webp", "image/svg+xml", "font/woff2", "application/octet-stream", "application/xml",
          "application/problem+json", "text/event-stream", "application/grpc-web+proto", "video/mp4",
          "application/x-protobuf")  # fmt: skip
_SERVERS = ("nginx", "nginx/1.24.0", "nginx/1.18.0 (Ubuntu)", "Apache", "Apache/2.4.58 (Unix)", "cloudflare",
            "AmazonS3", "CloudFront", "gws", "ESF", "Microsoft-IIS/10.0", "uvicorn", "gunicorn", "Werkzeug/3.0.1",
            "envoy", "istio-envoy", "Caddy", "openresty", "Vercel", "GitHub.com", "awselb/2.0",
            "TornadoServer/6.4", "Kestrel", "Jetty(9.4.53)", "SimpleHTTP/0.6 Python/3.12")  # fmt: skip
_CACHING = ("no-cache", "no-store", "no-store, max-age=0", "no-cache, no-store, must-revalidate", "max-age=0",
            "private, max-age=0", "max-age=0, private, must-revalidate", "public, max-age=31536000, immutable",
            "public, max-age=31536000", "public, max-age=3600", "max-age=604800", "private",
            "no-cache, no-store, max-age=0, must-revalidate", "public, max-age=0, must-revalidate",
            "s-maxage=86400, stale-while-revalidate=60")  # fmt: skip


class Traffic:
    """Headers of browsers, libraries, servers and CDNs, with values nobody else has."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def samples(self, count: int) -> list[bytes]:
        """Request and response headers in turns, as stored: the MessagePack slice of an event."""
        return [self._slice(self.request() if n % 2 else self.response()) for n in range(count)]

    def _slice(self, pairs: Pairs) -> bytes:
        lower = self._rng.random() < 0.55  # HTTP/2
        return bytes(
            events.pack_headers([((name.lower() if lower else name).encode(), value.encode()) for name, value in pairs])
        )

    def request(self) -> Pairs:
        kind = self._rng.random()
        if kind < 0.55:
            return self._browser()
        return self._library()

    def response(self) -> Pairs:
        rng, maybe = self._rng, self._maybe
        day = self._date()
        pairs = [("Date", day), ("Content-Type", rng.choice(_TYPES))]
        pairs += maybe(0.6, ("Content-Length", str(rng.randrange(1, 10 ** rng.randrange(2, 7)))))
        pairs += maybe(0.25, ("Transfer-Encoding", "chunked"))
        pairs += maybe(0.5, ("Connection", rng.choice(("keep-alive", "keep-alive", "close"))))
        pairs += maybe(0.15, ("Keep-Alive", "timeout=5"))
        pairs += maybe(0.8, ("Server", rng.choice(_SERVERS)))
        pairs += maybe(0.6, ("Cache-Control", rng.choice(_CACHING)))
        pairs += maybe(0.15, ("Pragma", "no-cache"))
        pairs += maybe(0.2, ("Expires", rng.choice(("0", "-1", self._date(), "Thu, 01 Jan 1970 00:00:00 GMT"))))
        pairs += maybe(0.35, ("ETag", self._etag()))
        pairs += maybe(0.3, ("Last-Modified", self._date()))
        pairs += maybe(0.4, ("Vary", rng.choice(("Accept-Encoding", "Origin", "Accept", "Accept-Encoding, Origin",
                                                 "Origin, Access-Control-Request-Method", "Cookie"))))  # fmt: skip
        pairs += maybe(0.35, ("Content-Encoding", rng.choice(("gzip", "br", "zstd"))))
        pairs += maybe(0.15, ("Accept-Ranges", "bytes"))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            pairs.append(("Set-Cookie", self._set_cookie()))
        if rng.random() < 0.4:
            pairs += self._security()
        if rng.random() < 0.3:
            pairs += self._cross_origin()
        pairs += maybe(0.4, ("X-Request-Id", self._identity()))
        pairs += maybe(0.1, ("X-Powered-By", rng.choice(("Express", "PHP/8.2.12", "ASP.NET", "Next.js"))))
        pairs += maybe(0.15, ("X-Runtime", f"0.{rng.randrange(10**6):06}"))
        pairs += maybe(0.1, ("Server-Timing", f"total;dur={rng.randrange(1000)}, db;dur={rng.randrange(100)}"))
        pairs += maybe(0.12, ("Location", self._url()))
        if rng.random() < 0.12:
            limit = rng.choice((60, 100, 1000, 5000))
            pairs += [("X-RateLimit-Limit", str(limit)), ("X-RateLimit-Remaining", str(rng.randrange(limit))),
                      ("X-RateLimit-Reset", str(1_700_000_000 + rng.randrange(10**8)))]  # fmt: skip
        pairs += maybe(0.05, ("WWW-Authenticate", f'Bearer realm="{self._word()}", error="invalid_token"'))
        pairs += maybe(0.04, ("Retry-After", str(rng.randrange(1, 300))))
        if rng.random() < 0.35:
            pairs += self._cdn()
        if rng.random() < 0.3:
            head, rest = pairs[:1], pairs[1:]
            rng.shuffle(rest)
            pairs = head + rest
        return pairs

    def _browser(self) -> Pairs:
        rng, maybe = self._rng, self._maybe
        system, version = rng.choice(_SYSTEMS), rng.randrange(115, 145)
        chromium = rng.random() < 0.7
        pairs = [("Host", self._host())]
        pairs += maybe(0.5, ("Connection", "keep-alive"))
        pairs += maybe(0.2, ("Content-Length", str(rng.randrange(2, 5000))))
        pairs += maybe(0.2, ("Content-Type", rng.choice(_BODY_TYPES)))
        pairs += maybe(0.2, ("Pragma", "no-cache"))
        pairs += maybe(0.3, ("Cache-Control", rng.choice(("no-cache", "max-age=0"))))
        if chromium:
            brand = rng.choice(("Google Chrome", "Microsoft Edge", "Brave"))
            platform = rng.choice(("Windows", "macOS", "Linux", "Android"))
            pairs += [
                ("sec-ch-ua", f'"{brand}";v="{version}", "Chromium";v="{version}", "Not_A Brand";v="24"'),
                ("sec-ch-ua-mobile", rng.choice(("?0", "?0", "?1"))),
                ("sec-ch-ua-platform", f'"{platform}"'),
            ]
            agent = (
                f"Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{version}.0.0.0 Safari/537.36"
            )
        elif rng.random() < 0.6:
            agent = f"Mozilla/5.0 ({system}; rv:{version}.0) Gecko/20100101 Firefox/{version}.0"
        else:
            agent = (f"Mozilla/5.0 ({system}) AppleWebKit/605.1.15 (KHTML, like Gecko)"
                     f" Version/17.{rng.randrange(7)} Mobile/15E148 Safari/604.1")  # fmt: skip
        pairs += maybe(0.3, ("Upgrade-Insecure-Requests", "1"))
        pairs += [("User-Agent", agent), ("Accept", rng.choice(_ACCEPTED))]
        pairs += maybe(0.35, ("Origin", f"https://{self._host()}"))
        site = rng.choice(("same-origin", "same-site", "cross-site", "none"))
        mode, destination = rng.choice((("cors", "empty"), ("cors", "empty"), ("navigate", "document"),
                                        ("no-cors", "script"), ("no-cors", "image"), ("no-cors", "style")))  # fmt: skip
        pairs += [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", destination)]
        pairs += maybe(0.2, ("Sec-Fetch-User", "?1"))
        pairs += maybe(0.7, ("Referer", self._url()))
        pairs += [("Accept-Encoding", rng.choice(("gzip, deflate, br, zstd", "gzip, deflate, br", "gzip, deflate"))),
                  ("Accept-Language", rng.choice(_LANGUAGES))]  # fmt: skip
        pairs += maybe(0.5, ("Cookie", self._cookies()))
        pairs += maybe(0.2, ("Authorization", self._credentials()))
        pairs += maybe(0.2, ("X-Requested-With", "XMLHttpRequest"))
        pairs += maybe(0.1, ("X-CSRF-Token", self._hex(32)))
        pairs += maybe(0.1, ("If-None-Match", self._etag()))
        pairs += maybe(0.1, ("If-Modified-Since", self._date()))
        pairs += maybe(0.1, ("Priority", rng.choice(("u=1, i", "u=0, i", "i", "u=4"))))
        pairs += maybe(0.06, ("Range", "bytes=0-"))
        pairs += maybe(0.2, ("X-Request-Id", self._identity()))
        if rng.random() < 0.04:
            pairs += [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
                      ("Sec-WebSocket-Key", self._hex(11) + "=="),
                      ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits")]  # fmt: skip
        return pairs

    def _library(self) -> Pairs:
        rng, maybe = self._rng, self._maybe
        minor, patch = rng.randrange(40), rng.randrange(10)
        agent = rng.choice((
            f"python-requests/2.{minor}.{patch}", f"python-httpx/0.{minor}.{patch}", f"curl/8.{patch}.1",
            f"curl/7.8{patch}.0", "Go-http-client/1.1", "Go-http-client/2.0", f"okhttp/4.{patch}.0",
            f"axios/1.{patch}.2", "node", f"Python/3.1{patch % 4} aiohttp/3.{patch}.5", f"Java/17.0.{patch}",
            f"Apache-HttpClient/4.5.{minor} (Java/17.0.{patch})", f"PostmanRuntime/7.{minor}.0",
            f"Dalvik/2.1.0 (Linux; U; Android 1{patch % 5}; Pixel {patch} Build/TQ3A)",
            f"{self._word().title()}/{patch}.{minor} CFNetwork/1494.0.7 Darwin/23.4.0",
            f"aws-sdk-go-v2/1.{minor}.{patch} os/linux lang/go#1.2{patch % 4}.0",
            f"Boto3/1.{minor}.{patch} md/Botocore#1.{minor}.{patch} os/linux lang/python#3.12",
        ))  # fmt: skip
        pairs = [("Host", self._host()), ("User-Agent", agent)]
        pairs += maybe(0.8, ("Accept", rng.choice(("*/*", "*/*", "application/json", "application/json, */*;q=0.8",
                                                  "application/json, text/plain, */*"))))  # fmt: skip
        pairs += maybe(0.8, ("Accept-Encoding", rng.choice(("gzip, deflate", "gzip, deflate, br", "gzip",
                                                           "gzip, deflate, br, zstd", "identity"))))  # fmt: skip
        pairs += maybe(0.15, ("Accept-Language", rng.choice(_LANGUAGES)))
        pairs += maybe(0.6, ("Connection", rng.choice(("keep-alive", "keep-alive", "close", "Keep-Alive"))))
        pairs += maybe(0.4, ("Content-Length", str(rng.randrange(2, 5000))))
        pairs += maybe(0.4, ("Content-Type", rng.choice(_BODY_TYPES)))
        pairs += maybe(0.4, ("Authorization", self._credentials()))
        pairs += maybe(0.1, ("X-API-Key", self._hex(32)))
        pairs += maybe(0.15, ("Cookie", self._cookies()))
        pairs += maybe(0.3, ("X-Request-Id", self._identity()))
        pairs += maybe(0.15, ("traceparent", f"00-{self._hex(32)}-{self._hex(16)}-01"))
        pairs += maybe(0.05, ("Idempotency-Key", self._identity()))
        pairs += maybe(0.08, ("X-Forwarded-For", ".".join(str(rng.randrange(256)) for _ in range(4))))
        pairs += maybe(0.08, ("X-Forwarded-Proto", "https"))
        return pairs

    def _security(self) -> Pairs:
        maybe, rng = self._maybe, self._rng
        age = rng.choice((
            "max-age=31536000; includeSubDomains", "max-age=31536000; includeSubDomains; preload", "max-age=31536000",
            "max-age=63072000; includeSubDomains; preload", "max-age=15552000",
        ))  # fmt: skip
        return [
            *maybe(0.8, ("Strict-Transport-Security", age)),
            *maybe(0.8, ("X-Content-Type-Options", "nosniff")),
            *maybe(0.7, ("X-Frame-Options", rng.choice(("SAMEORIGIN", "DENY")))),
            *maybe(0.5, ("X-XSS-Protection", rng.choice(("0", "1; mode=block")))),
            *maybe(0.5, ("Referrer-Policy", rng.choice(
                ("strict-origin-when-cross-origin", "no-referrer", "origin-when-cross-origin", "same-origin")))),
            *maybe(0.25, ("Content-Security-Policy",
                         f"default-src 'self'; script-src 'self' 'unsafe-inline' https://{self._host()};"
                         " style-src 'self' 'unsafe-inline'; img-src 'self' data: https:; frame-ancestors 'none';"
                         " object-src 'none'; base-uri 'self'")),
            *maybe(0.2, ("Permissions-Policy", "camera=(), microphone=(), geolocation=()")),
            *maybe(0.15, ("Cross-Origin-Opener-Policy", "same-origin")),
            *maybe(0.15, ("Cross-Origin-Resource-Policy", rng.choice(("cross-origin", "same-origin")))),
        ]  # fmt: skip

    def _cross_origin(self) -> Pairs:
        maybe = self._maybe
        origin = self._rng.choice(("*", f"https://{self._host()}"))
        return [
            ("Access-Control-Allow-Origin", origin),
            *maybe(0.5, ("Access-Control-Allow-Credentials", "true")),
            *maybe(0.4, ("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS")),
            *maybe(0.4, ("Access-Control-Allow-Headers", "Content-Type, Authorization, X-Requested-With")),
            *maybe(0.3, ("Access-Control-Expose-Headers", "Content-Length, ETag, Link, X-Request-Id")),
            *maybe(0.3, ("Access-Control-Max-Age", "86400")),
            *maybe(0.2, ("Timing-Allow-Origin", "*")),
        ]

    def _cdn(self) -> Pairs:
        rng = self._rng
        hit = rng.choice(("HIT", "MISS", "HIT", "DYNAMIC", "EXPIRED"))
        return rng.choice((
            [("CF-Cache-Status", hit), ("CF-RAY", f"{self._hex(16)}-{rng.choice(('FRA', 'LHR', 'IAD', 'CDG'))}"),
             ("alt-svc", 'h3=":443"; ma=86400'),
             ("NEL", '{"success_fraction":0,"report_to":"cf-nel","max_age":604800}')],
            [("X-Cache", rng.choice(("Hit from cloudfront", "Miss from cloudfront"))),
             ("Via", f"1.1 {self._hex(32)}.cloudfront.net (CloudFront)"), ("X-Amz-Cf-Pop", "FRA56-P4"),
             ("X-Amz-Cf-Id", self._hex(56)), ("Age", str(rng.randrange(10**5)))],
            [("Via", "1.1 varnish"), ("X-Served-By", f"cache-fra-{self._hex(10)}-FRA"), ("X-Cache", hit),
             ("X-Cache-Hits", str(rng.randrange(50))),
             ("X-Timer", f"S{rng.randrange(10**9)}.{rng.randrange(10**6)},VS0,VE1"),
             ("Age", str(rng.randrange(10**5)))],
            [("Via", "1.1 google"), ("alt-svc", 'h3=":443"; ma=2592000,h3-29=":443"; ma=2592000')],
            [("x-amz-request-id", self._hex(16).upper()), ("x-amz-id-2", self._hex(64)),
             ("x-amz-server-side-encryption", "AES256")],
            [("x-envoy-upstream-service-time", str(rng.randrange(500)))],
        ))  # fmt: skip

    def _maybe(self, chance: float, pair: tuple[str, str]) -> Pairs:
        return [pair] if self._rng.random() < chance else []

    def _word(self) -> str:
        return self._rng.choice(_WORDS)

    def _hex(self, length: int) -> str:
        return self._rng.randbytes((length + 1) // 2).hex()[:length]

    def _identity(self) -> str:
        text = self._hex(32)
        return text if self._rng.random() < 0.4 else "-".join(
            (text[:8], text[8:12], "4" + text[13:16], text[16:20], text[20:])
        )  # fmt: skip

    def _host(self) -> str:
        rng = self._rng
        sub = rng.choice(
            ("www", "api", "cdn", "static", "app", "auth", self._word(), f"{self._word()}{rng.randrange(9)}")
        )
        return f"{sub}.{self._word()}{self._word()}.{rng.choice(_TLDS)}"

    def _url(self) -> str:
        path = "/".join(self._word() for _ in range(self._rng.randrange(4)))
        query = f"?{self._word()}={self._rng.randrange(10**5)}" if self._rng.random() < 0.3 else ""
        return f"https://{self._host()}/{path}{query}"

    def _date(self) -> str:
        rng = self._rng
        clock = f"{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.randrange(60):02}"
        day = f"{rng.randrange(1, 29):02} {rng.choice(_MONTHS)} {rng.randrange(2024, 2030)}"
        return f"{rng.choice(_DAYS)}, {day} {clock} GMT"

    def _etag(self) -> str:
        return self._rng.choice(("", "", "W/")) + f'"{self._hex(self._rng.choice((16, 32, 40)))}"'

    def _cookies(self) -> str:
        rng = self._rng
        known = ("session", "sessionid", "csrftoken", "_ga", "_gid", "locale", "PHPSESSID", "JSESSIONID", "connect.sid",
                 "_fbp", "cf_clearance", "remember_token")  # fmt: skip
        values = [f"_ga=GA1.2.{rng.randrange(10**9)}.{rng.randrange(10**9)}"] if rng.random() < 0.3 else []
        values += [f"{rng.choice(known)}={self._hex(rng.choice((8, 26, 32, 64)))}" for _ in range(rng.randrange(1, 4))]
        return "; ".join(values)

    def _set_cookie(self) -> str:
        name = self._rng.choice(("session", "sessionid", "__cf_bm", "JSESSIONID", "csrftoken", "AWSALB"))
        rest = self._rng.choice((
            "; Path=/; HttpOnly", "; Path=/; Secure; HttpOnly; SameSite=Lax",
            "; path=/; secure; HttpOnly; SameSite=None", f"; Domain=.{self._word()}.com; Path=/",
            f"; Expires={self._date()}; Max-Age=31449600; Path=/; SameSite=Lax",
        ))  # fmt: skip
        return f"{name}={self._hex(40)}{rest}"

    def _credentials(self) -> str:
        if self._rng.random() < 0.25:
            return "Basic " + self._hex(24)
        if self._rng.random() < 0.5:
            return f"Bearer eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6I{self._hex(120)}.{self._hex(86)}"
        return "Bearer " + self._hex(40)


_BODY_TYPES = (
    "application/json", "application/json", "application/json; charset=utf-8", "application/x-www-form-urlencoded",
    "application/x-www-form-urlencoded; charset=UTF-8", "text/plain;charset=UTF-8", "application/grpc-web+proto",
    "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
)  # fmt: skip
_ACCEPTED = (
    "*/*", "*/*", "application/json, text/plain, */*", "application/json",
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,"
    "application/signed-exchange;v=b3;q=0.7",
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "text/css,*/*;q=0.1", "text/event-stream",
)  # fmt: skip


def train(size: int = SIZE) -> bytes:
    samples = Traffic(TRAINING).samples(_SAMPLES)
    return zstandard.train_dictionary(size, samples, dict_id=ID, level=codecs.LEVEL, d=8, k=200).as_bytes()


def _measured(name: str, pack: Callable[[bytes], bytes], samples: Sequence[bytes]) -> None:
    best = float("inf")
    for _ in range(7):
        begun = time.process_time()
        for sample in samples:
            pack(sample)
        best = min(best, time.process_time() - begun)
    packed = [pack(sample) for sample in samples]
    assert [codecs.unpack(stored) for stored in packed] == list(samples)
    size, stored = (sum(map(len, what)) / len(samples) for what in (samples, packed))
    print(f"{name}: {size:.0f} -> {stored:.0f} bytes, {best / len(samples) * 1e6:.1f} µs a slice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("compare", help="the dictionary in use against none, on held-out headers")
    commands.add_parser("write", help="train one").add_argument("path", type=Path)
    given = parser.parse_args()
    if given.command == "write":
        given.path.write_bytes(train())
        return
    held_out = Traffic(HELD_OUT).samples(4_000)
    _measured("without a dictionary", codecs.pack, held_out)
    _measured("with it", codecs.pack_headers, held_out)


if __name__ == "__main__":
    main()
