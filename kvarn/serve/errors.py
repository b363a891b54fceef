"""Errors as HTTP: every one has OpenAI's body, `{"error": {message, type, param, code}}`."""

import logging
from itertools import takewhile
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvarn.core.errors import EngineDied, KvarnError, QueueFull, RequestError, nearest

log = logging.getLogger("kvarn.serve")

#: seconds after which a client may come back when the engine is down or the server drains
COME_BACK = 2.0

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def as_request_error(error: Exception) -> RequestError:
    """Any error as one with a status, a code and a message for the client."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDied):
        return RequestError(str(error), code="engine_unavailable", status=503)
    if isinstance(error, KvarnError):
        return RequestError(str(error), code="server_error", status=500)
    return RequestError(
        "the server failed on this request; its log says where", code="internal_error", status=500
    )


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, default),
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: RequestError) -> dict[str, str]:
    """Retry-After where coming back helps; what a 401 must say."""
    if isinstance(error, QueueFull):
        return {"retry-after": str(max(1, round(error.retry_after)))}
    if error.status == 503:
        return {"retry-after": str(round(COME_BACK))}
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {}


def error_response(error: Exception) -> Response:
    """The whole response to a request that failed."""
    known = as_request_error(error)
    return Response(
        msgspec.json.encode(error_body(known)),
        known.status,
        headers=error_headers(known),
        media_type="application/json",
    )


def invalid_body(error: ValidationError, raw: bytes) -> RequestError:
    """What pydantic found wrong with a body, in one sentence."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    if first["type"] == "json_invalid":
        try:
            raw.decode()
        except UnicodeDecodeError as wrong:
            message = f"the body is not valid UTF-8 (byte {wrong.start}: {wrong.reason})"
            return RequestError(message, code="invalid_utf8")
        return RequestError(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    if not first["loc"]:
        return RequestError("the body must be a JSON object", code="invalid_body")
    param = str(first["loc"][0])
    same = [e for e in found if str(e["loc"][0]) == param]
    path = _common([e["loc"] for e in same])
    if first["type"] == "missing":
        return RequestError(f"the field {path!r} is required", param=param, code="missing_field")
    reasons = dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in same)
    return RequestError(f"field {path!r}: {', or '.join(reasons)}", param=param)


def _common(places: list[tuple[int | str, ...]]) -> str:
    """The path that all places share: where several forms were tried, the field itself."""
    shared = places[0]
    for place in places[1:]:
        shared = shared[: sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(shared, place)))]
    return ".".join(str(part) for part in shared)


def install(app: FastAPI) -> None:
    """Answer every error of the framework and of kvarn in OpenAI's form."""

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(_translate(app, request, error))
        response.headers.update(error.headers or {})
        return response

    async def own(request: Request, error: Exception) -> Response:
        return error_response(error)

    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(KvarnError, own)


def _translate(app: FastAPI, request: Request, error: HTTPException) -> RequestError:
    path = request.url.path
    if error.status_code == 404:
        message = f"there is no {path!r} here{nearest(path, app.openapi()['paths'])}"
        return RequestError(message, code="not_found", status=404)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path!r} does not take {request.method}; it takes {allowed}"
        return RequestError(message, code="method_not_allowed", status=405)
    return RequestError(str(error.detail), code="http_error", status=error.status_code)
