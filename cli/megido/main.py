"""The entry point of `megido`. A service's arguments are the service's own; everything else is `megido.app`."""

import importlib
import os
import sys
from collections.abc import Sequence

from megido_shared.errors import ConfigurationError
from megido_shared.service import guard

SERVICES = {
    "capture": ("megido_capture.__main__", "capture"),
    "ingest": ("megido_ingest.__main__", "server"),
    "api": ("megido_api.__main__", "server"),
    "replayer": ("megido_replayer.__main__", "server"),
}
"""Command → its module, and the extra that installs what it needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the work failed, 2 wrong usage."""
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # `megido list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] in SERVICES:
        return guard(lambda: run_service(arguments[0], arguments[1:]))
    from megido.app import run  # noqa: PLC0415 - typer is not needed to run a service

    return guard(lambda: run(arguments))


def run_service(name: str, arguments: list[str]) -> int:
    module, extra = SERVICES[name]
    try:
        service = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"megido {name} needs {error.name}, which is not installed; run: pip install 'megido[{extra}]'"
        ) from error
    code: int = service.main(arguments)
    return code
