"""What payload rules do to a request. Pure but for the request that they change."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote_to_bytes

from mitmproxy import http

from megido_capture.rules.jsonmembers import NoObject, put_members
from megido_shared.config import PayloadRule

BODY_CAP = 256 << 10
"""Bytes of a body that rules change. It is held, and read once for all rules, on the event loop: the worst bodies of
this size take it 100 ms. A larger one passes as it is."""

_JSON = ("application/json", "+json")
_FORM = "application/x-www-form-urlencoded"
_FORBIDDEN = {"header": "\r\n\0", "cookie": "\r\n\0;"}

type Failures = list[tuple[PayloadRule, Exception]]


class NotApplicable(Exception):
    """The request has no place for the rule's payload."""


def inject(rules: Sequence[PayloadRule], request: http.Request) -> Failures:
    """Puts the payloads of rules of one kind where they say, in one pass; of two for the same place, the later one's.
    What no rule names keeps its bytes. Returns the rules that could not be applied, and why: what one of them cannot
    be given harms no other."""
    failures: Failures = []
    members: dict[str, str] = {}
    usable = []
    for rule in rules:
        try:
            _check(rule)
        except (NotApplicable, UnicodeEncodeError) as error:
            failures.append((rule, error))
        else:
            members[rule.injection_point] = rule.payload_content
            usable.append(rule)
    if not usable:
        return failures
    try:
        _PUT[rules[0].injection_type](request, members)
    except Exception as error:  # noqa: BLE001 - a rule that fails harms nothing but itself
        failures += [(rule, error) for rule in usable]
    return failures


def kind_of(request: http.Request) -> str:
    """`json` or `form`; "" for a body that has no fields."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.endswith(_JSON):
        return "json"
    return "form" if media_type == _FORM else ""


def _check(rule: PayloadRule) -> None:
    text = rule.injection_point + rule.payload_content
    text.encode()
    if not rule.injection_point and rule.injection_type in _FORBIDDEN:
        raise NotApplicable(f"a {rule.injection_type} has a name")
    if any(character in text for character in _FORBIDDEN.get(rule.injection_type, "")):
        raise NotApplicable(f"a {rule.injection_type} cannot hold a line break or NUL, nor a cookie a semicolon")


def _put_headers(request: http.Request, members: Mapping[str, str]) -> None:
    wanted = {name.lower().encode(): (name.encode(), payload.encode()) for name, payload in members.items()}
    host = wanted.pop(b"host", None)
    placed = set()
    fields = []
    for field in request.headers.fields:
        name = field[0].lower()
        if name not in wanted:
            fields.append(field)
        elif name not in placed:
            placed.add(name)
            fields.append((field[0], wanted[name][1]))
    rest = [(name, given) for name, given in wanted.items() if name not in placed]
    fields += [(name if request.is_http2 else given, payload) for name, (given, payload) in rest]
    request.headers.fields = tuple(fields)
    if host is not None:
        request.host_header = host[1].decode()  # over HTTP/2 that is `:authority`


def _put_params(request: http.Request, members: Mapping[str, str]) -> None:
    target, hash_mark, fragment = request.data.path.partition(b"#")
    path, _, query = target.partition(b"?")
    request.data.path = path + b"?" + _put_pairs(query, members) + hash_mark + fragment


def _put_pairs(pairs: bytes, members: Mapping[str, str]) -> bytes:
    """`pairs` with the first one of each name replaced and further ones removed, or appended."""
    wanted = {
        name.encode(): b"=".join(quote(part, safe="").encode() for part in (name, payload))
        for name, payload in members.items()
    }
    kept: list[bytes] = []
    placed = set()
    for item in pairs.split(b"&") if pairs else ():
        name = item.partition(b"=")[0].strip()
        if b"%" in name or b"+" in name:
            name = unquote_to_bytes(name.replace(b"+", b" "))
        if name not in wanted:
            kept.append(item)
        elif name not in placed:
            placed.add(name)
            kept.append(wanted[name])
    kept += [pair for name, pair in wanted.items() if name not in placed]
    return b"&".join(kept)


def _put_cookies(request: http.Request, members: Mapping[str, str]) -> None:
    fields = list(request.headers.fields)
    at = [index for index, (field, _) in enumerate(fields) if field.lower() == b"cookie"]
    wanted = {name.encode(): f"{name}={payload}".encode() for name, payload in members.items()}
    if not at:
        fields.append((b"cookie" if request.is_http2 else b"Cookie", b"; ".join(wanted.values())))
        request.headers.fields = tuple(fields)
        return
    # HTTP/2 may send a field for each cookie; together they are one list.
    cookies = b"; ".join(fields[index][1] for index in at)
    kept: list[bytes] = []
    placed = set()
    for item in (stripped for item in cookies.split(b";") if (stripped := item.strip())):
        name = item.partition(b"=")[0]
        if name not in wanted:
            kept.append(item)
        elif name not in placed:
            placed.add(name)
            kept.append(wanted[name])
    kept += [pair for name, pair in wanted.items() if name not in placed]
    fields[at[0]] = (fields[at[0]][0], b"; ".join(kept))
    dropped = set(at[1:])
    request.headers.fields = tuple(field for index, field in enumerate(fields) if index not in dropped)


def _put_body(request: http.Request, members: Mapping[str, str]) -> None:
    content = request.raw_content or b""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise NotApplicable("the body is compressed")
    match kind_of(request):
        case "json":
            try:
                changed = put_members(content, members)
            except NoObject as error:
                raise NotApplicable(f"the body is no JSON object: {error}") from error
        case "form":
            changed = _put_pairs(content, members)
        case _:
            raise NotApplicable("the body is neither JSON nor a form")
    request.raw_content = changed
    if "transfer-encoding" not in request.headers:
        request.headers["content-length" if request.is_http2 else "Content-Length"] = str(len(changed))


_PUT = {"param": _put_params, "header": _put_headers, "cookie": _put_cookies, "body": _put_body}
