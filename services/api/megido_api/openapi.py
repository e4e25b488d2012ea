"""The OpenAPI document: every operation's errors as they are."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from megido_api.problems import ErrorAnswer

_REF = "#/components/schemas/ErrorAnswer"
_DATABASE_FREE = {"/livez", "/metrics"}


def describe(app: FastAPI) -> None:
    """Replaces the application's document, which is made once, when somebody asks for it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=_version(), summary=app.summary, routes=app.routes, openapi_version="3.1.0"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schema = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    schemas["ErrorAnswer"] = schema
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _errors(path, operation["responses"])
    return document


def _errors(path: str, responses: dict[str, Any]) -> None:
    """A bad field is 400 here, not the framework's 422; nearly everything needs Postgres."""
    if responses.pop("422", None):
        responses.setdefault("400", _answer("A field is wrong; the answer names it"))
    if path not in _DATABASE_FREE:
        responses.setdefault("503", _answer("Something that the API depends on is away; Retry-After says when"))


def _answer(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _REF}}}}


def _version() -> str:
    from importlib.metadata import version  # noqa: PLC0415 - only when the document is asked for

    return version("megido")
