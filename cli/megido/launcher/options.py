"""What `megido up` was asked for."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megido.main import SERVICES
from megido_shared.errors import ConfigurationError
from megido_shared.settings import DEFAULT_LOG_DIR, Common, common_from_env

_SECRETS = {"--auth-token": "PROXY_AUTH_TOKEN", "--auth-password": "PROXY_AUTH_PASSWORD"}
"""Flags of the proxy whose values go through the environment."""
_OURS = {
    "--listen-port": "the proxy's port is set with --proxy-port",
    "listen_port": "the proxy's port is set with --proxy-port",
    "--metrics-port": "megido up chooses the ports of metrics itself and shows them",
}
"""Options of the proxy that would contradict the screen, or have no effect."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """`common.database_url` is empty for the embedded Postgres. `capture_arguments` are passed on as they are, but
    for secrets: they go through `environment`, where `ps` does not show it."""

    common: Common
    log_dir: Path
    proxy_port: int
    api_port: int
    without: frozenset[str]
    open_browser: bool
    capture_arguments: tuple[str, ...]
    environment: Mapping[str, str]

    @classmethod
    def of(
        cls,
        *,
        data_dir: str = "",
        log_dir: str = "",
        proxy_port: int = 8080,
        api_port: int = 8000,
        kafka: str = "",
        database_url: str = "",
        without: Sequence[str] = (),
        open_browser: bool = False,
        capture_arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> "UpOptions":
        """Flags win over the environment. Raises ConfigurationError on what cannot work."""
        environment = dict(os.environ if env is None else env)
        left_out = frozenset(name.strip() for given in without for name in given.split(",") if name.strip())
        if unknown := sorted(left_out - SERVICES.keys()):
            raise ConfigurationError(f"--without {unknown[0]}: no such service; there are {', '.join(SERVICES)}")
        if proxy_port == api_port and not left_out & {"capture", "api"}:
            raise ConfigurationError(f"--proxy-port and --api-port are both {api_port}; choose another for one of them")
        arguments, secrets = _take_secrets(list(capture_arguments))
        _check(arguments)
        environment |= secrets
        if "capture" in left_out and arguments:
            raise ConfigurationError(f"{arguments[0]} is no option of megido up, and the proxy is left out; see --help")
        return cls(
            common=common_from_env(environment, data_dir=data_dir, kafka=kafka, database_url=database_url),
            log_dir=Path(log_dir or environment.get("PROXY_LOG_DIR") or DEFAULT_LOG_DIR).absolute(),
            proxy_port=proxy_port,
            api_port=api_port,
            without=left_out,
            open_browser=open_browser,
            capture_arguments=tuple(arguments),
            environment=environment,
        )

    @property
    def workers(self) -> int:
        """Of the proxy, for the screen; what is no number is the proxy's to refuse."""
        given = ""
        for before, argument in zip(("", *self.capture_arguments), self.capture_arguments, strict=False):
            if before == "--workers":
                given = argument
            elif argument.startswith("--workers="):
                given = argument.partition("=")[2]
        return int(given) if given.isdecimal() else 1

    def runs(self, service: str) -> bool:
        return service not in self.without

    @property
    def needs_database(self) -> bool:
        return any(self.runs(name) for name in ("ingest", "api", "replayer"))


def _check(arguments: Sequence[str]) -> None:
    for before, argument in zip(("", *arguments), arguments, strict=False):
        name, _, value = argument.partition("=")
        if before == "--set":
            name = name.strip()
        elif name == "--set":
            name = value.partition("=")[0].strip()
        if why := _OURS.get(name):
            raise ConfigurationError(f"{name} is no option of megido up: {why}")


def _take_secrets(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """What is left of the arguments, and variables for the secrets among them."""
    kept: list[str] = []
    secrets: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if variable := _SECRETS.get(flag):
            secrets[variable] = value if equals else next(rest, "")
        else:
            kept.append(argument)
    return kept, secrets
