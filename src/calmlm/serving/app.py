"""The routes of OpenAI's API over an engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import calmlm
from calmlm.errors import CalmError
from calmlm.serving.answers import Answer
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.engine import DrainingError, Engine, Piece, QueueFullError
from calmlm.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from calmlm.serving.refusals import Json, RefusalError, wrong_request
from calmlm.serving.requests import Job, find, make_job, tokens_of

OPEN = ("/health", "/metrics", "/openapi.json")  # what needs no key
log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorDetail


class GoneError(Exception):
    """The client does not wait for its answer any more."""


def make_app(catalogue: Catalogue, engine: Engine, *, api_key: str | None = None, max_body: int = 2**20) -> Any:
    """The server as an ASGI application.

    Args:
        catalogue: what is served.
        engine: a started engine.
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
    desk = Desk(catalogue, engine)
    begun = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are taken."""
        if engine.draining or not engine.alive:
            return Json({"status": "draining" if engine.draining else "failed"}, 503)
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(engine.metrics.page(), media_type="text/plain; version=0.0.4")

    def described(name: str) -> dict[str, Any]:
        limit = find(catalogue, name).limit
        return {"id": name, "object": "model", "created": begun, "owned_by": "calmlm", "max_model_len": limit}

    @app.get("/v1/models")
    async def models() -> Response:
        """The models that there are."""
        return Json({"object": "list", "data": [described(name) for name in catalogue.models]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """One of them."""
        return Json(described(model))

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Go on from a text."""
        return await desk.answer(asked, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Go on from a conversation."""
        return await desk.answer(asked, request)

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Response:
        """The tokens of a text."""
        served, ids = await desk.apart(partial(tokens_of, catalogue, asked))
        return Json({"count": len(ids), "max_model_len": served.limit, "tokens": ids})

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


class Desk:
    """Takes requests in the event loop, and hands their texts to the engine.

    Args:
        catalogue: what is served.
        engine: that writes.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine) -> None:
        self.catalogue, self.engine = catalogue, engine
        self._pool = ThreadPoolExecutor(1, "calmlm-tokens")  # one, since tokenizers are shared

    async def apart(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, without the event loop's waiting for it."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def answer(self, asked: CompletionRequest | ChatRequest, request: Request) -> Response:
        """Answer a request, whole or as a stream.

        Raises:
            RefusalError: it cannot be answered.
        """
        self._check_open()
        queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(place: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (place, piece))

        most = self.engine.max_batch + self.engine.max_queue
        job: Job = await self.apart(partial(make_job, self.catalogue, asked, deliver, most))
        try:
            self.engine.submit(job.writings)
        except (QueueFullError, DrainingError) as error:
            raise _refusal(error) from error
        chat = isinstance(asked, ChatRequest)
        answer = Answer(job, chat=chat, tells=asked.logprobs is not None and asked.logprobs is not False)
        pieces = self._pieces(request, job, queue)
        try:
            first = await anext(pieces)
            if asked.stream:
                events = _events(answer, first, pieces, asked.wants_usage)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            answer.add(*first)
            async for place, piece in pieces:
                answer.add(place, piece)
        except GoneError:
            return Response(status_code=499)  # nobody reads it
        return Json(answer.whole())

    def _check_open(self) -> None:
        if self.engine.draining or not self.engine.alive:
            raise _refusal(DrainingError())
        if self.engine.full:
            raise _refusal(QueueFullError())

    async def _pieces(
        self, request: Request, job: Job, queue: asyncio.Queue[tuple[int, Piece | None]]
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """What is written, until all choices have ended or the client is gone; nothing is written for nobody.

        Raises:
            GoneError: the client is gone.
            RefusalError: a text failed.
        """
        watcher = asyncio.create_task(self._watch(request, job, queue))
        left = len(job.writings)
        try:
            while left:
                place, piece = await queue.get()
                if piece is None:
                    raise GoneError
                if piece.error is not None:
                    raise _refusal(piece.error)
                left -= piece.finish is not None
                yield place, piece
        finally:
            watcher.cancel()
            if left:
                self.engine.cancel(job.writings)

    async def _watch(self, request: Request, job: Job, queue: asyncio.Queue[tuple[int, Piece | None]]) -> None:
        """Give the texts up when their client is gone."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.engine.cancel(job.writings)
        queue.put_nowait((-1, None))


async def _events(
    answer: Answer, first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece]], usage: bool
) -> AsyncIterator[str]:
    """The events of a stream; a text that fails ends it with an error."""
    held: list[list[Piece]] = [[] for _ in answer.choices]
    async with aclosing(pieces):
        for event in answer.opening(usage):
            yield event
        found: tuple[int, Piece] | None = first
        try:
            while found is not None:
                place, piece = found
                answer.add(place, piece)
                held[place].append(piece)
                if piece.text or piece.finish is not None:
                    yield answer.event(place, held[place], usage)
                    held[place] = []
                found = await anext(pieces, None)
        except GoneError:
            return
        except RefusalError as error:
            yield answer.failed(error.body)
            return
        for event in answer.closing(usage):
            yield event


def _refusal(error: Exception) -> RefusalError:
    """What the engine's errors are to a client."""
    if isinstance(error, DrainingError):
        return RefusalError(503, "The server is shutting down: ask another one.", code="shutting_down")
    if isinstance(error, QueueFullError):
        return RefusalError(429, "Too many requests are waiting: try again later.", code="queue_full")
    if isinstance(error, CalmError):
        return RefusalError(400, str(error))
    return RefusalError(500, "The text could not be written; the server's log says why.")


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
