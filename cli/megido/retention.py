"""`megido retention`: what is kept for how long, what a run removes, and what stays, over the REST API."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megido.client import Client

app = typer.Typer(
    help="Show and change what is kept for how long, and run it.", no_args_is_help=True, rich_markup_mode=None
)
_ApiUrl = Annotated[
    str, typer.Option("--api-url", help="MEGIDO_API_URL, PROXY_API_URL or http://localhost:8000 unless given.")
]
_Json = Annotated[bool, typer.Option("--json", help="JSON, one document a line.")]
_References = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids or flow_ids.")]
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@app.command("show")
def show(api_url: _ApiUrl = "", as_json: _Json = False) -> int:
    """Show the policy, what is stored by day, and the last run."""
    from megido.terminal import table, write  # noqa: PLC0415

    with _client(api_url) as client:
        found = client.retention()
    if as_json:
        write(json.dumps(found))
        return 0
    rows = [[name, _value(name, value)] for name, value in found["policy"].items()]
    write(table(("FIELD", "VALUE"), rows))
    write(f"\ndatabase: {_size(found['database_bytes'])}; pinned flows: {found['pinned_flows']}")
    if found["days"]:
        write("\n" + table(("DAY", "ON DISK"), [[day["day"], _size(day["bytes"])] for day in found["days"]]))
    if found["last_run"]:
        write("\nlast run:")
        _show_run(found["last_run"])
    return 0


@app.command("set")
def change(
    assignments: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="days=30 max_bytes=20GiB …; 0 is no limit.")
    ],
    api_url: _ApiUrl = "",
    as_json: _Json = False,
) -> int:
    """Change the policy: days, max_bytes, log_days, log_max_bytes, every_minutes. In force at the next run."""
    from megido.terminal import note, table, write  # noqa: PLC0415

    fields = dict(_assigned(text) for text in assignments)
    with _client(api_url) as client:
        found = client.change_retention(**fields)
    if as_json:
        write(json.dumps(found))
    else:
        write(table(("FIELD", "VALUE"), [[name, _value(name, value)] for name, value in found["policy"].items()]))
    if fields.get("days") or fields.get("max_bytes"):
        note("on Kafka, keep more days than the topics do: what is read again after its row has gone counts again")
    return 0


@app.command("run")
def run(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    api_url: _ApiUrl = "",
    as_json: _Json = False,
) -> int:
    """Remove what the policy does not keep, now; exit code 1 when the run failed or nobody does it."""
    from megido.terminal import note, write  # noqa: PLC0415

    with _client(api_url) as client:
        found = client.run_retention(dry_run=dry_run)
    if as_json:
        write(json.dumps(found))
    else:
        _show_run(found)
    if found["state"] in ("queued", "running"):
        note(f"run {found['id']} is {found['state']}; an ingest service does it: megido retention runs")
    return 0 if found["state"] == "done" else 1


@app.command("runs")
def runs(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1000)] = 20,
    api_url: _ApiUrl = "",
    as_json: _Json = False,
) -> int:
    """List runs: who asked, and what went."""
    from megido.history import clock  # noqa: PLC0415
    from megido.terminal import listing  # noqa: PLC0415

    def row(one: dict[str, Any]) -> list[str]:
        state = one["state"] + (", dry" if one["dry_run"] else "")
        what = one["error"] or _summary(one["report"])
        return [str(one["id"]), clock(one["requested_at"]), state, one["requested_by"], what]

    with _client(api_url) as client:
        found = client.retention_runs(limit=limit)["runs"]
    headings = ("ID", "TIME", "STATE", "BY", "WHAT")
    listing(found, headings, row, as_json=as_json, empty="nothing was removed so far", right=frozenset({0}))
    return 0


@app.command("pin")
def pin(references: _References, api_url: _ApiUrl = "") -> int:
    """Pin flows: no run removes them, nor their bodies, messages and errors."""
    from megido.terminal import write  # noqa: PLC0415

    with _client(api_url) as client:
        for reference in references:
            found = client.pin(reference)
            write(f"{found['id']} is pinned")
    return 0


@app.command("unpin")
def unpin(references: _References, api_url: _ApiUrl = "") -> int:
    """Let flows go with their day again."""
    with _client(api_url) as client:
        for reference in references:
            client.unpin(reference)
    return 0


@app.command("pins")
def pins(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1000)] = 100,
    api_url: _ApiUrl = "",
    as_json: _Json = False,
) -> int:
    """List pinned flows."""
    from megido.history import clock  # noqa: PLC0415
    from megido.terminal import listing  # noqa: PLC0415

    def row(one: dict[str, Any]) -> list[str]:
        return [str(one["id"] or ""), clock(one["pinned_at"]), one["pinned_by"], one["url"] or ""]

    with _client(api_url) as client:
        found = client.pins(limit=limit)["pins"]
    headings = ("ID", "PINNED", "BY", "URL")
    listing(found, headings, row, as_json=as_json, empty="no flow is pinned", right=frozenset({0}))
    return 0


def _client(api_url: str) -> "Client":
    from megido.client import Client  # noqa: PLC0415

    return Client(api_url)


def _assigned(text: str) -> tuple[str, int]:
    from megido_shared.errors import ConfigurationError  # noqa: PLC0415
    from megido_shared.retention import FIELDS  # noqa: PLC0415
    from megido_shared.settings import parse_size  # noqa: PLC0415

    name, equals, value = text.partition("=")
    if not equals or name not in FIELDS:
        raise ConfigurationError(f"{text!r} sets nothing; NAME=VALUE with {', '.join(FIELDS)}")
    if name.endswith("bytes"):
        return name, parse_size(name, value)
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(f"{name} is {value!r}; it must be a whole number, 0 for no limit")
    return name, int(value)


def _value(name: str, value: int) -> str:
    if not value:
        return "never by itself" if name == "every_minutes" else "no limit"
    return _size(value) if name.endswith("bytes") else str(value)


def _show_run(found: dict[str, Any]) -> None:
    from megido.terminal import table, write  # noqa: PLC0415

    report = found["report"]
    if found["error"]:
        write(f"failed: {found['error']}")
    if not report:
        return
    rows = [
        [day["day"], day["reason"], str(sum(day["rows"].values())), str(day["rows"].get("flows", 0)),
         str(sum(day["pinned"].values())), str(sum(day.get("open", {}).values())), _size(day["bytes"])]
        for day in report["days"]
    ]  # fmt: skip
    if rows:
        headings = ("DAY", "BY", "ROWS", "FLOWS", "PINNED ROWS STAY", "OPEN ROWS STAY", "ON DISK")
        write(table(headings, rows, right=frozenset({2, 3, 4, 5, 6})))
    write(("would remove: " if found["dry_run"] else "removed: ") + _summary(report))
    after = "would have" if found["dry_run"] else "has"
    write(f"the database {after} {_size(report['bytes_after'])}, before {_size(report['bytes_before'])}")
    if report["over_bytes"]:
        write(f"that is {_size(report['over_bytes'])} above max_bytes: today and yesterday stay whatever they weigh")


def _summary(report: dict[str, Any] | None) -> str:
    if not report:
        return ""
    others = sum(report["tables"].values())
    logs = f"{report['logs']['files']} log files ({_size(report['logs']['bytes'])})"
    return f"{len(report['days'])} days, {others} rows without days, {logs}, {report['bus']['segments']} segments"


def _size(count: int) -> str:
    size = float(count)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{count} bytes" if unit == _UNITS[0] else f"{size:.1f} {unit}"
