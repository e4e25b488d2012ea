"""`megido list`, `show`, `replay` and `replay-range`: the history, over the REST API."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any

from megido.client import ApiError, Client, Detail, Listed, Replayed
from megido.terminal import listing, note, safe, safe_line, write
from megido_shared.errors import ConfigurationError, MegidoError, Unavailable

_HEADINGS = ("ID", "TIME", "METHOD", "STATUS", "MS", "SIZE", "PROTOCOL", "SOURCE", "URL")
_RIGHT = frozenset({0, 3, 4, 5})


def list_requests(
    client: Client,
    *,
    limit: int,
    method: str,
    url: str,
    protocol: str,
    source_ip: str,
    search: str,
    as_json: bool,
) -> int:
    found = _matching(client, method=method, url=url, protocol=protocol, source_ip=source_ip, search=search)
    requests = list(islice(found, limit))
    empty = (
        "no request matches; send something through the proxy, or leave a filter out\n"
        f"connections that failed before a request: {client.api_url}/proxy/api/errors/list/"
    )
    listing(requests, _HEADINGS, _row, as_json=as_json, empty=empty, right=_RIGHT)
    return 0


def _matching(client: Client, *, url: str, search: str, **filters: str) -> Iterator[Listed]:
    """`--url` means the URL alone; the API's search looks at host and user agent as well, so it gives a superset."""
    for request in client.each_request(search=search or url, **filters):
        if url.lower() in request["url"].lower():
            yield request


def _row(request: Listed) -> list[str]:
    mark = " (replay)" if request["is_replay"] else ""
    return [
        str(request["id"]),
        clock(request["timestamp"]),
        request["method"],
        str(request["status_code"] or "-"),
        _ms(request["response_time"]),
        str(request["request_size"]),
        request["protocol"],
        request["source_ip"],
        request["url"] + mark,
    ]


def clock(timestamp: str) -> str:
    """In the reader's own time zone; as it is when that would be in the year 0 or 10000."""
    try:
        return datetime.fromisoformat(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except OverflowError:
        return timestamp


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def show(client: Client, reference: str, *, as_json: bool) -> int:
    detail = _existing(client, reference)
    if as_json:
        write(json.dumps(detail, ensure_ascii=False))
        return 0
    for line in _request_lines(detail):
        write(line)
    response = detail.get("response")
    if response is not None:
        write("")
        timing = f"{_ms(response['response_time'])} ms  {response['response_size']} bytes"
        write(f"Response  {response['status_code']}  {timing}")
        if response["error_message"]:
            write(f"Error     {safe_line(response['error_message'])}")
        _write_message(response, f"{detail['id']}/response/body")
    elif error := detail.get("error"):
        write("")
        write(f"Failed    {safe_line(error['error_type'])}: {safe_line(error['error_message'])}")
    else:
        write("\nNo response yet.")
    return 0


def _request_lines(detail: Detail) -> Iterator[str]:
    yield f"Request   {detail['id']}"
    yield f"URL       {safe_line(detail['url'])}"
    yield f"Method    {safe_line(detail['method'])}"
    yield f"Protocol  {safe_line(detail['protocol'])}"
    yield f"Time      {clock(detail['timestamp'])}"
    yield f"Source    {safe_line(detail['source_ip'])}"
    yield f"Agent     {safe_line(detail['user_agent'])}"
    yield f"Size      {detail['request_size']} bytes"
    if detail["is_replay"]:
        yield f"Replay of {detail['original_request_id'] or 'a request that is gone'}"
    yield from _message_lines(detail, f"{detail['id']}/body")


def _write_message(message: Any, place: str = "") -> None:
    for line in _message_lines(message, place):
        write(line)


def _message_lines(message: Any, place: str = "") -> Iterator[str]:
    """Headers and body. `place` is where the API has the body's bytes, below `requests/`."""
    pairs = message.get("raw_headers") or list(message["headers"].items())
    yield ""
    yield from (f"  {safe_line(name)}: {safe_line(value)}" for name, value in pairs)
    if message["body"]:
        yield ""
        if message.get("body_encoding") == "base64":
            yield "  (binary" + (f"; its bytes: GET /proxy/api/requests/{place})" if place else ")")
        else:
            yield safe(message["body"])
    if message.get("truncated"):
        yield "  (only this part is stored, see max_body_size; the size above is the true one)"


def replay(client: Client, reference: str, *, target_url: str, verify_tls: bool, verbose: bool, as_json: bool) -> int:
    answer = _replay(client, reference, target_url, verify_tls)
    if as_json:
        write(json.dumps(answer, ensure_ascii=False))
    else:
        write(_outcome(client, reference, answer))
        for deviation in answer.get("deviations", []):
            if verbose or not deviation.endswith("it is meant for a proxy"):  # always so, after a proxy
                note(f"sent differently from the original: {deviation}")
        if verbose:
            _write_verbose(answer)
    return 0 if answer["success"] else 1


def replay_range(
    client: Client, first: int, last: int, *, target_url: str, delay: float, verify_tls: bool, as_json: bool
) -> int:
    """Both ends included. Ids have gaps: one that nobody has is noted and left out."""
    if first > last:
        raise ConfigurationError(f"the range {first} to {last} is empty; the smaller id comes first")
    sent = failed = missing = 0
    # What this run stores gets ids too; it must not be sent again by it.
    newest = client.newest_id()
    if first > newest:
        raise MegidoError(f"no request has an id from {first} on; the newest is {newest}, see: megido list")
    for number in range(first, min(last, newest) + 1):
        if sent or failed:
            time.sleep(delay)
        try:
            answer = client.replay(number, target_url=target_url, verify_tls=verify_tls)
        except ApiError as error:
            if error.status == 404:
                missing += 1
            elif error.status == 409:  # posted a moment ago, or no request that can be sent: the others can
                failed += 1
                note(f"{number}: {error}")
            else:
                raise
            continue
        except Unavailable as error:
            if not sent and not failed:
                raise
            failed += 1
            note(str(error))
            continue
        sent += answer["success"]
        failed += not answer["success"]
        write(json.dumps(answer, ensure_ascii=False) if as_json else _outcome(client, str(number), answer))
    missing += max(last - newest, 0)
    gaps = f", {missing} {'id' if missing == 1 else 'ids'} that no request has" if missing else ""
    note(f"{sent} replayed, {failed} failed{gaps}")
    return 0 if sent and not failed else 1


def _replay(client: Client, reference: str, target_url: str, verify_tls: bool) -> Replayed:
    try:
        return client.replay(reference, target_url=target_url, verify_tls=verify_tls)
    except ApiError as error:
        raise _explained(error, reference) from error


def _existing(client: Client, reference: str) -> Detail:
    try:
        return client.request(reference)
    except ApiError as error:
        raise _explained(error, reference) from error


def _explained(error: ApiError, reference: str) -> MegidoError:
    if error.status == 404:
        return MegidoError(f"no request has the id {safe_line(reference)}; see: megido list")
    return error


def _outcome(client: Client, reference: str, answer: Replayed) -> str:
    """One line: what was sent where, and the answer's status, time and size."""
    request, response = answer["request"], answer["response"]
    what = f"{reference}: {safe_line(request['method'])} {safe_line(request['url'])}"
    if not answer["success"]:
        return f"{what} failed: {safe_line(answer['error_message'] or str(response.get('error')))}"
    replayed = answer["replayed_request_id"]
    size = _response_size(client, replayed, response)
    stored = f", stored as {replayed}" if replayed else ""
    return f"{what} → {response['status_code']} in {_ms(response['response_time'])} ms, {size} bytes{stored}"


def _response_size(client: Client, replayed: int | None, response: dict[str, Any]) -> int:
    """Of the stored answer: its text may be shorter or longer than what crossed the wire."""
    if replayed is not None:
        stored = client.request(replayed).get("response")
        if stored is not None:
            return stored["response_size"]
    return len(str(response["body"]).encode())


def _write_verbose(answer: Replayed) -> None:
    for message in (answer["request"], answer["response"] if answer["success"] else None):
        if message is not None:
            _write_message(message)
