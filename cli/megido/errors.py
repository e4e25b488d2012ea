"""`megido errors`: what failed, over the REST API. What each type means is in docs/errors.md."""

from itertools import islice

from megido.client import Client, ListedError
from megido.history import clock
from megido.terminal import listing
from megido_shared.errors import ConfigurationError
from megido_shared.events import ErrorType

_HEADINGS = ("ID", "TIME", "TYPE", "REQUEST", "SOURCE", "URL", "MESSAGE")
MAX_MESSAGE = 200
"""Characters of a message in the table; `--json` has all of it."""


def list_errors(client: Client, *, limit: int, error_type: str, source_ip: str, as_json: bool) -> int:
    """Raises ConfigurationError on a type that does not exist."""
    wanted = error_type.upper()
    if wanted and wanted not in list(ErrorType):
        raise ConfigurationError(f"--type is {error_type!r}; it must be one of {', '.join(ErrorType)}")
    errors = list(islice(client.each_error(error_type=wanted, source_ip=source_ip), limit))
    listing(errors, _HEADINGS, _row, as_json=as_json, empty="no error matches", right=frozenset({0, 3}))
    return 0


def _row(error: ListedError) -> list[str]:
    message = error["error_message"]
    return [
        str(error["id"]),
        clock(error["timestamp"]),
        error["error_type"],
        str(error["request_id"] or "-"),
        error["source_ip"] or "-",
        error["url"] or "-",
        message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…",
    ]
