"""`megido accounting`: what became of everything that was captured, over the REST API."""

import json
from typing import Any

from megido.client import Client
from megido.terminal import note, safe_line, table, write

_NUMBERS = ("captured", "stored", "waiting", "dead_lettered", "dropped", "expired", "corrupt", "unexplained")
_HEADINGS = ("NODE", *(name.upper().replace("_", "-") for name in _NUMBERS), "HEARD", "")


def accounting(client: Client, *, as_json: bool) -> int:
    """1 when something is lost, or accounted for in no way or twice; dead letters and what waits are neither."""
    found = client.accounting()
    total = found["total"]
    failed = bool(total["lost"]) or not found["balanced"]
    if as_json:
        write(json.dumps(found, ensure_ascii=False))
        return int(failed)
    nodes = found["nodes"]
    if not nodes:
        note("no node was ever heard of; start one: megido capture")
        return int(failed)
    rows = [_row(node["node"], node, _age(node["heartbeat_age"])) for node in nodes]
    write(table(_HEADINGS, [*rows, _row("total", total, "")], right=frozenset(range(1, len(_NUMBERS) + 2))))
    for line in _notes(found):
        note(line)
    return int(failed)


def _row(name: str, sums: dict[str, Any], heard: str) -> list[str]:
    shown = {**sums, "dropped": sum(sums["dropped"].values()), "waiting": sums["waiting"] + sums["since_heartbeat"]}
    return [name, *(str(shown[number]) for number in _NUMBERS), heard, "" if sums["exact"] else "not exact yet"]


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"


def _notes(found: dict[str, Any]) -> list[str]:
    total = found["total"]
    lines = []
    if total["dropped"]:
        reasons = ", ".join(f"{safe_line(reason)} {count}" for reason, count in total["dropped"].items())
        lines.append(f"dropped because of: {reasons}")
    if total["dead_lettered"]:
        lines.append("dead letters are kept with their reason, and can be put through again")
    if found["posted"]["waiting"]:
        lines.append(f"{found['posted']['waiting']} posted records wait in the outbox")
    if found["bus"]:
        lines.append(f"the bus could not be asked: {safe_line(found['bus'])}")
    if total["unexplained"] > 0:
        lines.append(f"{total['unexplained']} records were captured and are nowhere: lost")
    elif total["unexplained"] < 0:
        lines.append(f"{-total['unexplained']} records were counted twice")
    elif not found["exact"]:
        lines.append("nothing is missing so far; final once all is drained and idle")
    return lines
