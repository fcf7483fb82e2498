"""The desk of a server whose models run in several replicas on a Ray cluster.

Ray Serve chooses the replica of each request and starts a new one in the place of one that is lost. A request whose
replica is lost is sent again: with its seed, so that the same text is written, of which the client is told what it does
not have yet.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from ray import exceptions as lost
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException, RequestCancelledError

from calmlm.serving.desk import GoneError, Part, Start, Told, refusal_of
from calmlm.serving.engine import DrainingError, QueueFullError
from calmlm.serving.metrics import FleetMetrics
from calmlm.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from calmlm.serving.refusals import RefusalError

RETRIES = 3  # times that a request is sent again because its replica was lost
PAUSE = 0.1  # seconds before it is sent again, times the number of the try
PATIENCE = 5  # seconds that replicas have to tell their figures
LOST = (
    lost.RayActorError,
    lost.WorkerCrashedError,
    lost.NodeDiedError,
    lost.ObjectLostError,
    lost.TaskCancelledError,
    DeploymentUnavailableError,
    RequestCancelledError,
)
log = logging.getLogger(__name__)


class LostError(Exception):
    """A replica was lost before its answer was whole."""


class Fleet:
    """Hands requests to replicas.

    Args:
        handle: of the deployment of ``calmlm.serving.replicas.Replica``.
        limits: tokens of a text and its prompt at most, by the name of each model.
        replicas: how many there are to be.
        room: texts that each of them takes on.
        running: tells how many of them can be asked; may block.
    """

    def __init__(
        self, handle: Any, limits: Mapping[str, int], replicas: int, room: int, running: Callable[[], int]
    ) -> None:
        self.limits, self.idle, self.metrics = limits, threading.Event(), FleetMetrics()
        self.idle.set()
        self._handle, self._replicas, self._room, self._running = handle, replicas, room, running
        self._writes = handle.options(method_name="write", stream=True)
        self._open = 0
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining

    async def alive(self) -> bool:
        """Whether a replica can be asked."""
        try:
            return await asyncio.get_running_loop().run_in_executor(None, self._running) > 0
        except (lost.RayError, RayServeException):
            return False

    def check_open(self) -> None:
        """Raise a RefusalError where no request can be taken."""
        if self._draining:
            raise refusal_of(DrainingError())
        if self._open >= self._replicas * self._room:
            raise refusal_of(QueueFullError())

    def drain(self) -> None:
        """Take nothing new; ``idle`` is set when all that was accepted is written."""
        self._draining = True

    async def page(self) -> bytes:
        """The figures of all replicas, each under its name, and those of this desk."""
        try:
            asked = self._handle.broadcast("figures")
            found = await asked.results_async(timeout_s=PATIENCE, return_exceptions=True)
        except (lost.RayError, RayServeException, TimeoutError):
            found = []
        return self.metrics.page(dict(entry for entry in found if not isinstance(entry, BaseException)))

    async def tokens(self, asked: TokenizeRequest) -> list[int]:
        """The tokens of a text or a conversation.

        Raises:
            RefusalError: there are none.
        """
        losses = 0
        while True:
            try:
                found = await self._handle.tokens.remote(asked)
            except LOST as error:
                losses = await self._lose(losses, error)
                continue
            if isinstance(found, RefusalError):
                raise found
            return found

    async def write(self, asked: CompletionRequest | ChatRequest, gone: asyncio.Future[None]) -> AsyncGenerator[Told]:
        """What a replica writes, and what others write on where it is lost; see ``Desk``."""
        self.idle.clear()
        self._open += 1
        try:
            if self._draining:
                raise refusal_of(DrainingError())
            if asked.seed is None:  # or else another replica would draw another text
                asked = asked.model_copy(update={"seed": secrets.randbelow(2**62)})
            record, losses, full = Record(), 0, 0
            while True:
                record.rewind()
                try:
                    async with aclosing(self._ask(asked, gone)) as told:
                        if asked.stream:
                            async for entry in told:
                                fresh = record.fresh(entry)
                                if fresh:
                                    yield fresh
                            return
                        whole = [entry async for entry in told]
                    for entry in whole:
                        yield entry
                    return
                except LostError as error:
                    losses = await self._lose(losses, error.__cause__ or error)
                except RefusalError as error:
                    full += 1
                    if error.code != "queue_full" or (not losses and full >= self._replicas):
                        raise
                    if losses:  # it was accepted once, and waits for its place
                        await asyncio.sleep(PAUSE)
        finally:
            self._open -= 1
            if not self._open:
                self.idle.set()

    async def _ask(self, asked: CompletionRequest | ChatRequest, gone: asyncio.Future[None]) -> AsyncGenerator[Told]:
        """What one replica writes.

        Raises:
            GoneError: the client is gone.
            LostError: the replica is.
            RefusalError: the request cannot be answered, or a text failed.
        """
        answer = self._writes.remote(asked)

        def leave(_gone: Any) -> None:
            answer.cancel()

        gone.add_done_callback(leave)
        left, ended = -1, False
        try:
            async for told in answer:
                if isinstance(told, RefusalError):
                    ended = True
                    raise told
                if isinstance(told, Start):
                    left = told.choices
                else:
                    left -= sum(part.finish is not None for part in told)
                yield told
            if left:
                raise LostError
            ended = True
        except LOST as error:
            if gone.done():
                raise GoneError from error
            raise LostError from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # it is not we who are cancelled
                raise LostError from error
            raise
        except lost.RayError as error:
            log.error("A replica failed: %s.", type(getattr(error, "cause", None) or error).__name__)
            raise refusal_of(error) from error
        finally:
            gone.remove_done_callback(leave)
            if not ended:
                answer.cancel()

    async def _lose(self, losses: int, error: BaseException) -> int:
        """Count one more loss of a request's, and wait a little; its number.

        Raises:
            RefusalError: there were too many.
        """
        losses += 1
        log.warning("A replica was lost with a request (%s).", type(error).__name__)
        if losses > RETRIES:
            raise RefusalError(
                503,
                f"The request was lost with {losses} replicas, one after the other: try again later.",
                code="replicas_lost",
            )
        self.metrics.retries.inc()
        await asyncio.sleep(PAUSE * losses)
        return losses


class Record:
    """What a client has been told, so that it is told nothing twice when its text is written again."""

    def __init__(self) -> None:
        self._start: Start | None = None
        self._told: list[list[tuple[int | None, str, str | None]]] = []
        self._seen: list[int] = []

    def rewind(self) -> None:
        """The text is written from its beginning."""
        self._seen = [0] * len(self._told)

    def fresh(self, told: Told) -> Told:
        """What of an entry is new.

        Raises:
            RefusalError: it does not go with what has been told.
        """
        if isinstance(told, Start):
            if self._start is None:
                self._start = told
                self._told = [[] for _ in range(told.choices)]
                self.rewind()
                return told
            if told != self._start:
                raise _differs()
            return ()
        fresh: list[Part] = []
        for part in told:
            known, seen = self._told[part.choice], self._seen[part.choice]
            said = (part.token, part.text, part.finish)
            self._seen[part.choice] += 1
            if seen == len(known):
                known.append(said)
                fresh.append(part)
            elif known[seen] != said:
                raise _differs()
        return fresh


def _differs() -> RefusalError:
    return RefusalError(
        503,
        "The replica that wrote this text was lost, and another one writes it otherwise: ask again.",
        code="replica_lost",
    )
