"""Writes `docs/reference/`: the events' JSON Schema, the AsyncAPI document, the topics, the help of every command.

Usage: python scripts/reference.py [--check]. With --check nothing is written; exit code 1 names what is stale.
A test runs the check, so that the reference cannot fall behind the code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import _json_schema
from typer.main import get_command

from megido.app import app
from megido.main import SERVICES
from megido_shared import events
from megido_shared.bus.topics import TOPICS, Topic

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
_BYTES = {"type": "string", "contentEncoding": "base64"}
EVENT_TYPES = events.AnyEvent.__value__.__args__


def event_schemas() -> dict[str, Any]:
    """One JSON Schema a type, as `$defs`. On the wire the same maps are MessagePack: bytes are `bin`, not base64."""
    definitions = _definitions()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:megido:events:v1",
        "title": f"Megido events, version {events.SCHEMA_VERSION}",
        "description": (events.__doc__ or "").strip(),
        "oneOf": [{"$ref": f"#/$defs/{kind.__name__}"} for kind in EVENT_TYPES],
        "$defs": dict(sorted(definitions.items())),
    }


def _definitions() -> dict[str, Any]:
    # msgspec writes every default into a schema and cannot do so for a Raw one (0.22): those become "no pairs".
    plain = _json_schema.to_builtins
    _json_schema.to_builtins = lambda value, **options: (
        [] if isinstance(value, msgspec.Raw) else plain(value, **options)
    )
    try:
        _, definitions = msgspec.json.schema_components(EVENT_TYPES, ref_template="#/$defs/{name}")
    finally:
        _json_schema.to_builtins = plain
    pair = {"type": "array", "prefixItems": [_BYTES, _BYTES], "minItems": 2, "maxItems": 2}
    for part in ("Request", "Response"):
        for name in ("headers", "trailers"):
            definitions[part]["properties"][name] = {"type": "array", "items": pair, "default": []}
    return definitions


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0: a channel a topic, the messages that travel on it."""
    on_topic: dict[str, list[str]] = {topic.name: [] for topic in TOPICS}
    for kind, topic in events.TOPIC_OF_TYPE.items():
        on_topic[topic.name].append(kind.__name__)
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Megido", "version": str(events.SCHEMA_VERSION), "description": "The topics of Megido."},
        "defaultContentType": "application/msgpack",
        "channels": {
            topic.name: {
                "address": topic.name,
                "description": f"Key: {topic.key}. {topic.partitions} partitions, cleanup {topic.cleanup}.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in on_topic[topic.name]},
                "bindings": {"kafka": {"partitions": topic.partitions, "topicConfiguration": _topic_config(topic)}},
            }
            for topic in TOPICS
        },
        "components": {
            "messages": {
                kind.__name__: {
                    "name": kind.__name__,
                    "summary": " ".join((kind.__doc__ or "").split()),
                    "headers": {
                        "type": "object",
                        "properties": {
                            "ce_specversion": {"const": "1.0"},
                            "ce_id": {"type": "string"},
                            "ce_source": {"type": "string"},
                            "ce_type": {"const": f"megido.{kind.__name__}.v{events.SCHEMA_VERSION}"},
                        },
                    },
                    "payload": {"$ref": f"events.schema.json#/$defs/{kind.__name__}"},
                }
                for kind in EVENT_TYPES
            }
        },
    }


def _topic_config(topic: Topic) -> dict[str, Any]:
    config: dict[str, Any] = {"cleanup.policy": topic.cleanup.split(",")}
    if "delete" in topic.cleanup:
        config |= {"retention.ms": topic.retention_ms, "retention.bytes": topic.retention_bytes}
    return config


def topics_page() -> str:
    lines = [
        "# Topics",
        "",
        "Made from `megido_shared/bus/topics.py` by `scripts/reference.py`; `megido migrate` creates them. Values are",
        "MessagePack maps as in [events.schema.json](events.schema.json), headers are CloudEvents 1.0 attributes in",
        "Kafka's binary content mode. Replication is 1 on one broker, 3 (two in sync) on three and more.",
        "",
        "| topic | key | partitions | cleanup | kept | events |",
        "|---|---|---|---|---|---|",
    ]
    for topic in TOPICS:
        kinds = ", ".join(kind.__name__ for kind, on in events.TOPIC_OF_TYPE.items() if on is topic)
        kept = "the last value of a key" if topic.cleanup == "compact" else f"{topic.retention_ms // 86_400_000} days"
        row = (f"`{topic.name}`", topic.key, str(topic.partitions), topic.cleanup, kept, kinds or "–")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def commands() -> dict[str, tuple[str, ...]]:
    """By title the module to run and the words behind it: every command that there is, groups followed to their
    ends, and the forwarder, which is a child of others."""
    found = {f"megido {' '.join(words)}": ("megido", *words) for words in _words(get_command(app))}
    for service, (module, _) in SERVICES.items():
        found[f"megido {service}"] = (module.removesuffix(".__main__"),)
    return {"megido": ("megido",), **found, "the forwarder": ("megido_shared.bus.forwarder",)}


def _words(command: Any) -> Iterator[tuple[str, ...]]:
    """Of each command below a group. A group of its own says nothing that its commands do not say."""
    for name, below in getattr(command, "commands", {}).items():
        if below.hidden:
            continue
        if not hasattr(below, "commands"):
            yield (name,)
        for words in _words(below):
            yield (name, *words)


def commands_page() -> str:
    """What `--help` of each command prints."""
    lines = ["# Commands", "", "Made by `scripts/reference.py`: what `--help` says.", ""]
    for title, (module, *words) in commands().items():
        lines += [f"## {title}", "", "```text", _help(module, *words), "```", ""]
    return "\n".join(lines)


def _help(module: str, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MEGIDO_", "PROXY_"))}
    environment |= {"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", module, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def pages() -> dict[str, str]:
    return {
        "events.schema.json": json.dumps(event_schemas(), indent=2) + "\n",
        "asyncapi.json": json.dumps(asyncapi(), indent=2) + "\n",
        "topics.md": topics_page(),
        "commands.md": commands_page(),
    }


def stale() -> list[str]:
    """Names of the pages that differ from what the code says."""
    return [
        name
        for name, text in pages().items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != text
    ]


def main() -> int:
    if "--check" in sys.argv[1:]:
        if found := stale():
            print(f"stale: {', '.join(found)}; run: .venv/bin/python scripts/reference.py")
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
