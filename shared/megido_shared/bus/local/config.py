"""The current configuration of each scope: a file, replaced by rename (the local bus's compacted topic)."""

import asyncio
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from urllib.parse import quote, unquote

from megido_shared.bus.local.files import make_dir, replace

WATCH_SECONDS = 0.1


class ConfigFiles:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, scope: str, value: bytes) -> None:
        make_dir(self._directory)
        replace(self._path(scope), value, sync=True)

    def get(self, scope: str) -> bytes | None:
        try:
            return self._path(scope).read_bytes()
        except FileNotFoundError:
            return None

    def all(self) -> dict[str, bytes]:
        try:
            names = [path.name for path in self._directory.iterdir() if not path.name.startswith(".")]
        except FileNotFoundError:
            return {}
        found = ((scope, self.get(scope)) for scope in map(unquote, names))
        return {scope: value for scope, value in found if value is not None}

    async def watch(self, scopes: Collection[str]) -> AsyncIterator[tuple[str, bytes]]:
        seen: dict[str, tuple[int, int]] = {}
        while True:
            for scope in scopes:
                version = self._version(scope)
                if version and version != seen.get(scope):
                    # The version is read first: a value replaced in between is told once more, never missed.
                    seen[scope] = version
                    value = self.get(scope)
                    if value is not None:
                        yield scope, value
            await asyncio.sleep(WATCH_SECONDS)

    def _path(self, scope: str) -> Path:
        """A scope may hold anything (`app:<source_app>`); a file name may not."""
        quoted = quote(scope, safe=":")
        return self._directory / (quoted.replace(".", "%2E", 1) if quoted.startswith(".") else quoted)

    def _version(self, scope: str) -> tuple[int, int] | None:
        try:
            found = self._path(scope).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns
