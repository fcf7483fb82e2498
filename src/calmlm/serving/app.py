"""The routes of OpenAI's API."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import calmlm
from calmlm.serving.answers import Answer
from calmlm.serving.desk import Desk, GoneError, Part, Start, Told, tells
from calmlm.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from calmlm.serving.refusals import Json, RefusalError, no_model, wrong_request

OPEN = ("/health", "/metrics", "/openapi.json")  # what needs no key


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorDetail


def make_app(desk: Desk, *, api_key: str | None = None, max_body: int = 2**20) -> Any:
    """The server as an ASGI application.

    Args:
        desk: what answers.
        api_key: what requests have to bring as a bearer token, or None.
        max_body: bytes of a request.
    """
    keyed = [] if api_key is None else [Depends(HTTPBearer(auto_error=False))]  # for the OpenAPI document
    app = FastAPI(
        title="calmlm",
        version=calmlm.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        default_response_class=Json,
        dependencies=keyed,
        responses={"4XX": {"model": ErrorBody}, 503: {"model": ErrorBody}},
    )
    begun = int(time.time())

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken."""
        if desk.draining or not await desk.alive():
            return Json({"status": "draining" if desk.draining else "failed"}, 503)
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(await desk.page(), media_type="text/plain; version=0.0.4")

    def described(name: str) -> dict[str, Any]:
        if name not in desk.limits:
            raise no_model(name)
        limit = desk.limits[name]
        return {"id": name, "object": "model", "created": begun, "owned_by": "calmlm", "max_model_len": limit}

    @app.get("/v1/models")
    async def models() -> Response:
        """The models that there are."""
        return Json({"object": "list", "data": [described(name) for name in desk.limits]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """One of them."""
        return Json(described(model))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Go on from a text."""
        return await _answer(desk, asked, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Go on from a conversation."""
        return await _answer(desk, asked, request)

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        """The tokens of a text."""
        ids = await desk.tokens(asked)
        return Json({"count": len(ids), "max_model_len": desk.limits[asked.model], "tokens": ids})

    @app.exception_handler(RefusalError)
    async def refuse(_request: Request, error: RefusalError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def refuse_form(_request: Request, error: RequestValidationError) -> Response:
        return wrong_request(list(error.errors())).response

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            message = f"The server must know {request.method} {request.url.path}, but does not: see /openapi.json."
        else:
            message = "The request body must be JSON, but it cannot be read: send JSON."
        return RefusalError(error.status_code, message).response

    @app.exception_handler(Exception)
    async def refuse_fault(_request: Request, _error: Exception) -> Response:
        return RefusalError(500, "The server failed; its log says why.").response

    return Door(app, api_key, max_body)


async def _answer(desk: Desk, asked: CompletionRequest | ChatRequest, request: Request) -> Response:
    """Answer a request, whole or as a stream.

    Raises:
        RefusalError: it cannot be answered.
    """
    desk.check_open()
    parts = _parts(desk, asked, request)
    try:
        start = await anext(parts)
        assert isinstance(start, Start)
        answer = Answer(start, chat=isinstance(asked, ChatRequest), tells=tells(asked))
        if asked.stream:
            first = await anext(parts)  # what fails before it still has a status of its own
            events = _events(answer, first, parts, asked.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        async for group in parts:
            for part in _group(group):
                answer.add(part)
    except GoneError:
        return Response(status_code=499)  # nobody reads it
    return Json(answer.whole())


async def _parts(desk: Desk, asked: CompletionRequest | ChatRequest, request: Request) -> AsyncGenerator[Told]:
    """What is written, until all choices have ended or the client is gone; nothing is written for nobody."""
    gone = asyncio.create_task(_gone(request))
    try:
        async with aclosing(desk.write(asked, gone)) as told:
            async for entry in told:
                yield entry
    finally:
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _group(told: Told) -> Sequence[Part]:
    assert not isinstance(told, Start)
    return told


async def _events(answer: Answer, first: Told, parts: AsyncGenerator[Told], usage: bool) -> AsyncIterator[str]:
    """The events of a stream; a text that fails ends it with an error."""
    held: list[list[Part]] = [[] for _ in answer.choices]
    async with aclosing(parts):
        for event in answer.opening(usage):
            yield event
        found: Told | None = first
        try:
            while found is not None:
                for part in _group(found):
                    answer.add(part)
                    held[part.choice].append(part)
                    if part.text or part.finish is not None:
                        yield answer.event(held[part.choice], usage)
                        held[part.choice] = []
                found = await anext(parts, None)
        except GoneError:
            return
        except RefusalError as error:
            yield answer.failed(error.body)
            return
        for event in answer.closing(usage):
            yield event


class Door:
    """What stands before the routes: the key, and the size of a request. Nothing of a key is ever logged."""

    def __init__(self, app: Any, api_key: str | None, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if self._key is not None and scope["path"] not in OPEN:
                self._check_key(scope)
            body = await self._body(scope, receive)
        except RefusalError as error:
            await error.response(scope, receive, send)
            return
        if body is None:  # the client is gone
            return
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check_key(self, scope: Any) -> None:
        found = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = found.partition(b" ")
        right = hmac.compare_digest(_digest(key.strip()), self._key or b"")
        if kind.lower() != b"bearer" or not right:
            raise RefusalError(401, "The request must bring the server's API key, but it does not: send it as a bearer "
                               "token.", code="invalid_api_key")  # fmt: skip

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        with suppress(ValueError):
            self._check_size(int(length))
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if size > self.max_body:
            raise RefusalError(
                413, f"The request must have at most {self.max_body} bytes: send less.", code="too_large"
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
