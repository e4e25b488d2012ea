"""The one error shape: `{"error": {"code", "message", "details"}}`, for every error of every route."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from megido_shared.db.outbox import TooLarge
from megido_shared.errors import Unavailable

RETRY_AFTER_S = 1

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    503: "unavailable",
}

_log = logging.getLogger(__name__)


class ErrorBody(BaseModel):
    code: str = Field(description="what happened, for programs", examples=["not_found"])
    message: str = Field(description="what happened, for people", examples=["no request has the id 123"])
    details: dict[str, Any] = Field(description="more, by code; `fields` names the fields that were wrong")


class ErrorAnswer(BaseModel):
    """Every error looks like this."""

    error: ErrorBody


class Problem(Exception):
    """An answer that is an error. Raised anywhere below a route."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        content = {"error": {"code": self.code, "message": self.message, "details": self.details}}
        return JSONResponse(content, self.status, self.headers)


def not_found(what: str, reference: object) -> Problem:
    return Problem(404, "not_found", f"no {what} has the id {reference}")


def bad_field(field: str, problem: str, **more: Any) -> Problem:
    """400 that names the field."""
    entry = {"field": field, "problem": problem} | more
    return Problem(400, "invalid", f"{field}: {problem}", fields=[entry])


def unavailable(message: str, code: str = "unavailable") -> Problem:
    """503 with Retry-After: trying again may help."""
    return Problem(503, code, message, headers={"Retry-After": str(RETRY_AFTER_S)})


def install(app: FastAPI) -> None:
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(TooLarge, _too_large)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)


async def _problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return error.response()


async def _unavailable(_: Request, error: Exception) -> JSONResponse:
    return unavailable(str(error)).response()


async def _too_large(_: Request, error: Exception) -> JSONResponse:
    return Problem(413, "too_large", str(error)).response()


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "error")
    return Problem(error.status_code, code, str(error.detail), headers=error.headers).response()


async def _validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    fields = [{"field": _field(found), "problem": _message(found)} for found in error.errors()]
    summary = "; ".join(f"{entry['field']}: {entry['problem']}" for entry in fields)
    return Problem(400, "invalid", summary, fields=fields).response()


async def _defect(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.scope.get("path"), exc_info=error)
    return Problem(500, "internal", "the server failed; its log says why").response()


def _field(found: Mapping[str, Any]) -> str:
    """`("query", "limit")` is `limit`; `("body", "apps", 0)` is `apps.0`; the whole body is `body`."""
    where, *inner = found["loc"]
    if found["type"] == "json_invalid":
        return str(where)  # `inner` is a position in the text
    return ".".join(str(part) for part in inner) or str(where)


def _message(found: Mapping[str, Any]) -> str:
    if found["type"] == "extra_forbidden":
        return "is not known here; leave it out or see /docs for the right name"
    if found["type"] == "int_parsing":
        return "must be a whole number"
    if found["type"] in ("model_attributes_type", "dict_type"):
        return "must be a JSON object, sent with Content-Type: application/json"
    if found["type"] == "json_invalid":
        return f"not JSON ({found['ctx']['error']})"
    return str(found["msg"]).removeprefix("Value error, ")
