"""`megido dead-letters`: records that could not be stored, over the REST API."""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from megido.client import ApiError, Client, DeadLetter
from megido.history import clock
from megido.terminal import listing, note, safe, safe_line, write
from megido_shared.errors import ConfigurationError, MegidoError

STATES = ("new", "queued", "redriven", "discarded")
REDRIVABLE = ("new", "queued", "discarded")
MAX_REASON = 200
"""Characters of a reason in the table; `--json` has all of it."""
_HEADINGS = ("ID", "TIME", "STATE", "TRIES", "TOPIC", "TYPE", "SIZE", "REASON")


def list_letters(client: Client, *, limit: int, topic: str, reason: str, state: str, as_json: bool) -> int:
    """Raises ConfigurationError on a state that does not exist."""
    _check_state(state, STATES)
    letters = list(islice(client.each_dead_letter(topic=topic, reason=reason, state=state), limit))
    listing(letters, _HEADINGS, _row, as_json=as_json, empty="no dead letter matches", right=frozenset({0, 3, 6}))
    return 0


def show(client: Client, letter_id: int, *, as_json: bool) -> int:
    try:
        letter = client.dead_letter(letter_id)
    except ApiError as error:
        raise _explained(error, letter_id) from error
    if as_json:
        write(json.dumps(letter, ensure_ascii=False))
        return 0
    changed = f" by {letter['changed_by']} at {clock(letter['changed_at'] or '')}" if letter["changed_by"] else ""
    tries = f", put through {letter['attempts']} times" if letter["attempts"] else ""
    for name, value in (
        ("state", f"{letter['state']}{changed}{tries}"),
        ("since", clock(letter["created_at"])),
        ("from", f"{letter['topic']} {letter['partition']}/{letter['offset']} of {letter['source_id']}"),
        ("type", letter["event_type"] or "-"),
        ("size", f"{letter['size']} bytes"),
        ("reason", letter["reason"]),
    ):
        write(f"{name + ':':<8} {safe_line(value)}")
    if letter["decoded"] is None:
        write("\n(no MessagePack; --json has the bytes as base64)")
    else:
        write("\n" + safe(json.dumps(letter["decoded"], ensure_ascii=False, indent=2)))
    return 0


def redrive(
    client: Client, letter_ids: Sequence[int], *, every: bool, topic: str, reason: str, state: str, as_json: bool
) -> int:
    """By id, or all that a filter names. Raises ConfigurationError when neither or both are given."""
    filters = {name: value for name, value in (("topic", topic), ("reason", reason), ("state", state)) if value}
    if bool(letter_ids) == bool(every or filters):
        raise ConfigurationError("name dead letters by their ids, or say --all, --topic, --reason or --state")
    _check_state(state, REDRIVABLE)
    if letter_ids:
        return _redrive_some(client, letter_ids, as_json=as_json)
    queued, too_large, more, after = 0, 0, True, 0
    while more:  # always onwards: what is refused again meanwhile is not met twice
        done = client.redrive_dead_letters(after=after, **filters)
        queued += done["queued"]
        too_large += done["too_large"] if not after else 0
        more, after = done["more"], done["last_id"] or after
    if as_json:
        write(json.dumps({"queued": queued, "too_large": too_large}))
    else:
        _say_queued(queued)
    if too_large:
        note(f"{too_large} are larger than any bus takes and stay")
        return 1
    return 0


def discard(client: Client, letter_ids: Sequence[int]) -> int:
    for letter_id in letter_ids:
        try:
            client.discard_dead_letter(letter_id)
        except ApiError as error:
            raise _explained(error, letter_id) from error
    note(f"{len(letter_ids)} discarded; redrive takes one up again")
    return 0


def _redrive_some(client: Client, letter_ids: Sequence[int], *, as_json: bool) -> int:
    for letter_id in letter_ids:
        try:
            letter = client.redrive_dead_letter(letter_id)
        except ApiError as error:
            raise _explained(error, letter_id) from error
        if as_json:
            write(json.dumps(letter, ensure_ascii=False))
    if not as_json:
        _say_queued(len(letter_ids))
    return 0


def _say_queued(count: int) -> None:
    note(f"{count} on their way through ingest again; see: megido dead-letters list")


def _check_state(state: str, known: Sequence[str]) -> None:
    if state and state not in known:
        raise ConfigurationError(f"--state is {state!r}; it must be one of {', '.join(known)}")


def _explained(error: ApiError, letter_id: int) -> MegidoError:
    if error.status == 404:
        return MegidoError(f"no dead letter has the id {letter_id}; see: megido dead-letters list")
    return error


def _row(letter: DeadLetter) -> list[Any]:
    reason = letter["reason"]
    return [
        str(letter["id"]),
        clock(letter["created_at"]),
        letter["state"],
        str(letter["attempts"]),
        letter["topic"],
        letter["event_type"] or "-",
        str(letter["size"]),
        reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 1] + "…",
    ]
