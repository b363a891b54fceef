"""HTTP pieces that all endpoints share: reading bodies, JSON and event-stream answers, the gate."""

import asyncio
import hmac
import logging
import uuid
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvarn.core.errors import KvarnError, RequestError
from kvarn.serve.errors import as_request_error, error_body, error_response, invalid_body
from kvarn.serve.options import ServeOptions

log = logging.getLogger("kvarn.serve")

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

#: paths that need no API key: probes and scrapers have none
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})
DONE = b"data: [DONE]\n\n"


async def read(request: Request, model: type[M], limit: int) -> M:
    """The body as `model`; raises `RequestError` that says what is wrong with it."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise too_large(limit)
    try:
        return model.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise invalid_body(error, bytes(raw)) from None


def too_large(limit: int) -> RequestError:
    """413."""
    return RequestError(
        f"the body is larger than {limit} bytes, the limit of this server",
        code="body_too_large",
        status=413,
    )


def json_response(body: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class ClientGone(Exception):
    """The client closed the connection before the answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, cancelling it (and raising `ClientGone`) as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task, watch)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Events as they come; the source is closed as soon as the client goes away.

    An error of the source becomes a last event with OpenAI's error body; no `[DONE]` follows it.
    """

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self.source = source
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send_all(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(work, watch)
            await self.source.aclose()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for chunk in self.source:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if not isinstance(error, KvarnError):
                log.exception("a stream failed")
            last = event(error_body(as_request_error(error)))
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Gate:
    """Outermost: request ids, API key, body size, and an answer even to our own mistakes."""

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self.app = app
        self.options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id") or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self.app(scope, receive, tagged)
        except RequestError as error:
            await error_response(error)(scope, receive, tagged)
        except ClientGone:
            if not started:
                await Response(status_code=499)(scope, receive, tagged)
        except Exception as error:
            log.exception("request %s failed", request_id)
            if not started:
                await error_response(error)(scope, receive, tagged)

    def _check(self, path: str, headers: Headers) -> None:
        """Raise what the headers alone already show to be wrong."""
        key = self.options.api_key
        if key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                what = "wrong API key" if given else "this server needs an API key"
                raise RequestError(
                    f"{what}; send the header 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    status=401,
                )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.options.max_body:
            raise too_large(self.options.max_body)
