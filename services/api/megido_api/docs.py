"""`/docs`: the OpenAPI document as one page that needs no script, no other file and no other host."""

import base64
import hashlib
import json
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; text-transform: capitalize; }
details { border: 1px solid #8884; border-radius: 6px; margin: .4rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
code, pre { font-family: ui-monospace, monospace; font-size: .92em; }
pre { overflow: auto; background: #8881; padding: .6rem; border-radius: 6px; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
CSP = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; frame-ancestors 'none'"


def page(document: dict[str, Any]) -> str:
    """The whole page. Every text of the document is escaped."""
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["other"])[0]
            by_tag.setdefault(tag, []).append(_operation(path, method, operation, document))
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(found)}" for tag, found in by_tag.items())
    info = document["info"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])} API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(info['title'])} API {escape(info['version'])}</h1><p>{escape(info.get('summary', ''))}</p>"
        '<p>For programs: <a href="/openapi.json">openapi.json</a>. Every error is '
        "<code>{&quot;error&quot;: {&quot;code&quot;, &quot;message&quot;, &quot;details&quot;}}</code>.</p>"
        f"{sections}</body></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], document: dict[str, Any]) -> str:
    parts = [
        f"<p>{escape(operation['description'])}</p>" if "description" in operation else "",
        _parameters(operation.get("parameters", [])),
        _body(operation.get("requestBody"), document),
        _responses(operation["responses"], document),
    ]
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><code><span class="method">{method.upper()}</span> '
        f"{escape(path)}</code> — {escape(operation['summary'])}</summary>{''.join(parts)}</details>"
    )


def _parameters(parameters: list[dict[str, Any]]) -> str:
    if not parameters:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(found['name'])}</code></td><td>{escape(_type(found.get('schema', {})))}</td>"
        f"<td>{escape(found.get('description') or found.get('schema', {}).get('description') or '')}</td></tr>"
        for found in parameters
    )
    return f"<table><tr><th>Parameter</th><th>Type</th><th></th></tr>{rows}</table>"


def _body(body: dict[str, Any] | None, document: dict[str, Any]) -> str:
    if body is None:
        return ""
    return "".join(
        f"<p>Body, <code>{escape(kind)}</code>:</p>{_schema(found, document)}"
        for kind, found in body["content"].items()
    )


def _responses(responses: dict[str, Any], document: dict[str, Any]) -> str:
    found = []
    for status, answer in sorted(responses.items()):
        contents = answer.get("content", {})
        shape = "" if status.startswith(("4", "5")) else "".join(_schema(one, document) for one in contents.values())
        found.append(f"<p><b>{escape(status)}</b> {escape(answer.get('description', ''))}</p>{shape}")
    return "".join(found)


def _schema(content: dict[str, Any], document: dict[str, Any]) -> str:
    """The fields of an object by name and type."""
    schema = _resolved(content.get("schema", {}), document)
    if not schema:
        return ""
    return f"<pre>{escape(json.dumps(_outline(schema, document, 0), indent=2, ensure_ascii=False))}</pre>"


def _outline(schema: dict[str, Any], document: dict[str, Any], depth: int) -> Any:
    schema = _resolved(schema, document)
    if "properties" in schema and depth < 4:
        return {name: _outline(one, document, depth + 1) for name, one in schema["properties"].items()}
    if schema.get("type") == "array":
        return [_outline(schema.get("items", {}), document, depth + 1)]
    objects = [one for one in schema.get("anyOf", []) if "$ref" in one]
    if objects:
        return _outline(objects[0], document, depth)
    text = _type(schema)
    return f"{text} — {schema['description']}" if "description" in schema else text


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    kind = str(schema.get("format") or schema.get("type", "any"))
    return f"{kind} = {schema['default']}" if schema.get("default") not in (None, "") else kind
