"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, always with the right status.

What is wrong with a request is told with the field's name in `param`; what is wrong with us is logged, and the client
learns only that it happened (vLLM: `entrypoints/openai/server_utils.py`).
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from folovllm.engine.protocol import EngineDeadError

MAX_SHOWN_VALUE = 80
"""Characters of a refused value that an error message repeats."""


_SHORT = reprlib.Repr()  # a refused value may have megabytes
_SHORT.maxstring = _SHORT.maxother = MAX_SHOWN_VALUE
MAX_ERRORS = 64
"""Of what pydantic reports, so many are looked at."""
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""HTTP status -> `type`."""


class ClientDisconnected(Exception):
    """The client is gone; nobody will read an answer."""


class APIError(HTTPException):
    """An answer other than success. A kind of HTTPException: FastAPI lets those pass while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param`: the field of the request that is to blame; `code`: a short name for programs."""
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the JSON object that clients get."""
        kind = ERROR_TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        """Return the body as ASCII JSON: the message may repeat what is no valid UTF-8."""
        return json.dumps(self.body()).encode()

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(self.encode(), self.status_code, self.headers, "application/json")


class BadRequestError(APIError):
    """400: the field `param` cannot be what it is."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param, code)


def dead_engine_error() -> APIError:
    """Return the 503 of an engine that is gone."""
    return APIError(503, "The engine is not running; try again later.", code="engine_dead")


def from_value_error(error: ValueError, fields: Collection[str], aliases: Mapping[str, str]) -> BadRequestError:
    """Return the 400 for a ValueError of the engine, whose message begins with the name of what is wrong.

    Args:
        error: from SamplingParams, the Processor or generate().
        fields: fields of the request.
        aliases: the engine's name -> the request's, where they differ; takes precedence.
    """
    message = str(error)
    match = re.match(r"[a-z_]+", message)
    name = match.group() if match else ""
    param = aliases.get(name, name)
    if param not in fields:
        return BadRequestError(message)
    if param != name:
        rest = message.removeprefix(name)
        message = param + rest if rest[:1] in "=:." else f"{param}: {message}"
    return BadRequestError(message, param)


def from_validation_errors(errors: Sequence[Any], body: Any) -> BadRequestError:
    """Return the 400 for what pydantic found wrong with `body`, a parsed JSON document.

    Of a field with several allowed forms pydantic reports what each form dislikes: `param` is then what all these
    reports have in common.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "")
        return BadRequestError(f"The body is no valid JSON: {detail}.".replace("..", "."), code="invalid_json")
    path, _ = _path(first, body)
    if not path:
        if not isinstance(body, dict):
            return BadRequestError(
                "The body must be a JSON object; send it with the header Content-Type: application/json.",
                code="invalid_body",
            )
        return BadRequestError(first["msg"])
    same_field = [error for error in errors[:MAX_ERRORS] if _is_alternative(first, error, body)]
    path = _common_prefix([_path(error, body)[0] for error in same_field])
    param = _dotted(path)
    if first["type"] == "extra_forbidden" and len(same_field) == 1:
        return BadRequestError(f"{param}: unknown field; it is not supported.", param, "unknown_field")
    if first["type"] == "missing" and len(same_field) == 1:
        return BadRequestError(f"{param}: this field is required.", param, "missing_field")
    reasons = " or ".join(dict.fromkeys(str(error["msg"]).removesuffix(".") for error in same_field[:6]))
    return BadRequestError(f"{param}={_shown(_lookup(body, path))}: {reasons}.", param, "invalid_value")


def _path(error: Any, body: Any) -> tuple[list[str | int], int]:
    """Return where in `body` the error is: pydantic's location without the names of union members.

    And the place in pydantic's location of the first such name; the location's length where it has none.
    """
    path: list[str | int] = []
    current = body
    location = list(error["loc"])
    first_name = len(location)
    for i, part in enumerate(location[1:], 1):  # without "body"
        if (isinstance(current, dict) and part in current) or (
            isinstance(current, list) and isinstance(part, int) and part < len(current)
        ):
            current = current[part]
        elif error["type"] != "missing" or i < len(location) - 1:
            first_name = min(first_name, i)
            continue
        path.append(part)
    return path, first_name


def _is_alternative(first: Any, other: Any, body: Any) -> bool:
    """Whether two errors are what two members of one union say: their locations part at a member's name."""
    if first is other:
        return True
    pairs = zip(first["loc"], other["loc"], strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return place is not None and place >= max(_path(first, body)[1], _path(other, body)[1])


def _common_prefix(paths: Sequence[Sequence[str | int]]) -> list[str | int]:
    prefix: list[str | int] = []
    for parts in zip(*paths, strict=False):
        if any(part != parts[0] for part in parts):
            break
        prefix.append(parts[0])
    return prefix


def _dotted(path: Sequence[str | int]) -> str:
    """["messages", 0, "role"] -> "messages[0].role"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return text if len(text) <= 2 * MAX_SHOWN_VALUE else text[: 2 * MAX_SHOWN_VALUE] + "..."


def _lookup(body: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            return None
    return body


def _shown(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= MAX_SHOWN_VALUE else text[:MAX_SHOWN_VALUE] + "..."


def install_handlers(app: FastAPI) -> None:
    """Let `app` answer every exception that it expects; RequestIdMiddleware has the others."""
    app.add_exception_handler(APIError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(EngineDeadError, _on_dead_engine)
    app.add_exception_handler(ClientDisconnected, _on_disconnect)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error.response()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation_errors(error.errors(), error.body).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # The router's own: an unknown path or method, a body that cannot be parsed.
    message = {
        404: f"There is no {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }.get(error.status_code, str(error.detail))
    return APIError(error.status_code, message, headers=error.headers).response()


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=408)  # for the log: nobody reads it


async def _on_dead_engine(request: Request, error: Exception) -> Response:
    return dead_engine_error().response()
