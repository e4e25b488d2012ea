"""`megido logs`: the newest entries of the JSON log files, and clean-up by age, over the REST API."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megido.client import Client

app = typer.Typer(help="Read the JSON log files, and remove old ones.", no_args_is_help=True, rich_markup_mode=None)
_ApiUrl = Annotated[
    str, typer.Option("--api-url", help="MEGIDO_API_URL, PROXY_API_URL or http://localhost:8000 unless given.")
]
_Json = Annotated[bool, typer.Option("--json", help="JSON, one document a line.")]
_Limit = Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1000)]
_COLUMNS = {
    "requests": ("method", "url", "source_ip"),
    "responses": ("status_code", "url", "response_time"),
    "websockets": ("direction", "message_type", "payload_size", "url"),
    "errors": ("error_type", "url", "error_message"),
    "auth": ("success", "username", "source_ip", "failure_reason"),
}


@app.command("recent")
def recent(
    log_type: Annotated[str, typer.Argument(metavar="[TYPE]", help=f"{', '.join(_COLUMNS)} or general.")] = "requests",
    limit: _Limit = 20,
    api_url: _ApiUrl = "",
    as_json: _Json = False,
) -> int:
    """Show the newest entries, newest first: of requests, responses, websockets, errors, auth, or the general log."""
    from megido.client import Client  # noqa: PLC0415
    from megido_shared.errors import ConfigurationError  # noqa: PLC0415

    if log_type != "general" and log_type not in _COLUMNS:
        raise ConfigurationError(f"{log_type!r} is no type of log; there are {', '.join(_COLUMNS)} and general")
    with Client(api_url) as client:
        if log_type == "general":
            return _general(client, limit, as_json=as_json)
        return _entries(client, log_type, limit, as_json=as_json)


@app.command("clean")
def clean(
    *,
    days: Annotated[int, typer.Option("--days", help="Days (UTC) that are kept beside today.", min=0)] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    api_url: _ApiUrl = "",
    as_json: _Json = False,
) -> int:
    """Remove log files of days that ended more than --days days ago. What is stored in Postgres stays."""
    from megido.client import Client  # noqa: PLC0415
    from megido.terminal import write  # noqa: PLC0415

    with Client(api_url) as client:
        found = client.clean_logs(days, dry_run=dry_run)
    if as_json:
        write(json.dumps(found))
        return 0
    hours = found["hours"]
    span = f", from {hours[0]} to {hours[-1]} (day and hour, UTC)" if hours else ""
    verb = "would go" if dry_run else "removed"
    write(f"{found['removed']} files with {found['bytes']} bytes {verb}{span}, below {found['directory']}")
    return 0


def _entries(client: "Client", log_type: str, limit: int, *, as_json: bool) -> int:
    from megido.terminal import listing  # noqa: PLC0415

    found = client.recent_logs(log_type, limit)
    columns = _COLUMNS[log_type]
    listing(
        found["logs"],
        ("TIME", "ID", *(name.upper().replace("_", " ") for name in columns)),
        lambda entry: _row(entry, columns),
        as_json=as_json,
        empty=_none(found, log_type),
        right=frozenset({1}),
    )
    return 0


def _general(client: "Client", limit: int, *, as_json: bool) -> int:
    from megido.terminal import note, safe_line, write  # noqa: PLC0415

    found = client.general_log(limit)
    for line in found["lines"]:
        write(json.dumps({"line": line}, ensure_ascii=False) if as_json else safe_line(line))
    if not found["lines"] and not as_json:
        note(_none(found, "general"))
    return 0


def _row(entry: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    values = [entry.get(name) for name in columns]
    return [str(entry.get("timestamp", "")), str(entry.get("id", "")), *("" if v is None else str(v) for v in values)]


def _none(found: dict[str, Any], log_type: str) -> str:
    if found["readable"]:
        return f"no {log_type} log in {found['directory']}"
    return f"{found['directory']} does not exist on the API's machine; start ingest and api with the same --log-dir"
