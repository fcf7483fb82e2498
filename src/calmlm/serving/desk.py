"""What stands between the routes and the models: a request goes in, and what is written for it comes back in parts.

``EngineDesk`` hands it to an engine in this process, ``calmlm.serving.fleet.Fleet`` to one of several replicas.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from calmlm.errors import CalmError
from calmlm.serving.catalogue import Catalogue, Served
from calmlm.serving.engine import DrainingError, Engine, QueueFullError
from calmlm.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from calmlm.serving.refusals import RefusalError
from calmlm.serving.requests import Job, make_job, tokens_of
from calmlm.serving.writing import Piece


class GoneError(Exception):
    """The client does not wait for its answer any more."""


@dataclass(frozen=True)
class Start:
    """What is known of an answer before anything is written.

    Attributes:
        model: its name.
        prompts: how many tokens each prompt has.
        choices: how many texts are written.
    """

    model: str
    prompts: tuple[int, ...]
    choices: int


@dataclass(frozen=True)
class Word:
    """A token as it is told.

    Attributes:
        text: of the token alone.
        raw: its bytes.
        logprob: natural logarithm of its probability.
    """

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True)
class Part:
    """What one token adds to a choice.

    Attributes:
        choice: of the answer, from 0.
        text: what the token settles; often nothing.
        token: its id; None where none was taken.
        place: how many characters stood before it.
        finish: ``"stop"`` or ``"length"`` where the choice ends with it.
        word: the token, where its probability is told; None for one that only ends the text.
        top: the likeliest tokens, where they are told.
    """

    choice: int
    text: str
    token: int | None
    place: int
    finish: str | None
    word: Word | None = None
    top: tuple[Word, ...] = ()


Told = Start | Sequence[Part]
"""What comes back for a request: first a Start, then parts in groups, until each choice has its finish."""


class Desk(Protocol):
    """What the routes ask, and what a signal tells.

    Attributes:
        limits: tokens of a text and its prompt at most, by the name of each model.
        idle: set while nothing that was accepted is unfinished.
    """

    idle: threading.Event

    @property
    def limits(self) -> Mapping[str, int]: ...

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        ...

    async def alive(self) -> bool:
        """Whether texts can be written."""
        ...

    def check_open(self) -> None:
        """Raise a RefusalError where no request can be taken."""
        ...

    async def page(self) -> bytes:
        """Figures in Prometheus' text format."""
        ...

    async def tokens(self, asked: TokenizeRequest) -> list[int]:
        """The tokens of a text or a conversation.

        Raises:
            RefusalError: there are none.
        """
        ...

    def write(self, asked: CompletionRequest | ChatRequest, gone: asyncio.Future[None]) -> AsyncGenerator[Told]:
        """What is written for a request; it is given up when this is closed.

        Args:
            asked: the request.
            gone: done when its client is gone.

        Raises:
            GoneError: the client is gone.
            RefusalError: the request cannot be answered, or a text failed.
        """
        ...

    def drain(self) -> None:
        """Take nothing new; may be called in a signal handler."""
        ...


class EngineDesk:
    """Hands requests to an engine in this process.

    Args:
        catalogue: what is served.
        engine: started.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine) -> None:
        self.catalogue, self.engine = catalogue, engine
        self.limits = {name: served.limit for name, served in catalogue.models.items()}
        self.idle = engine.idle
        self._pool = ThreadPoolExecutor(1, "calmlm-tokens")  # one, since tokenizers are shared

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self.engine.draining

    async def alive(self) -> bool:
        """Whether the engine runs."""
        return self.engine.alive

    def check_open(self) -> None:
        """Raise a RefusalError where no request can be taken."""
        if self.engine.draining or not self.engine.alive:
            raise refusal_of(DrainingError())
        if self.engine.full:
            raise refusal_of(QueueFullError())

    async def page(self) -> bytes:
        """The engine's figures."""
        return self.engine.metrics.page()

    async def tokens(self, asked: TokenizeRequest) -> list[int]:
        """The tokens of a text or a conversation.

        Raises:
            RefusalError: there are none.
        """
        return await self._apart(partial(tokens_of, self.catalogue, asked))

    async def write(self, asked: CompletionRequest | ChatRequest, gone: asyncio.Future[None]) -> AsyncGenerator[Told]:
        """What the engine writes; see ``Desk``."""
        queue: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(place: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (place, piece))

        most = self.engine.max_batch + self.engine.max_queue
        job: Job = await self._apart(partial(make_job, self.catalogue, asked, deliver, most))
        try:
            self.engine.submit(job.writings)
        except (QueueFullError, DrainingError) as error:
            raise refusal_of(error) from error

        def leave(_gone: Any) -> None:
            self.engine.cancel(job.writings)
            queue.put_nowait(None)

        gone.add_done_callback(leave)
        left, told = len(job.writings), tells(asked)
        try:
            yield Start(job.served.name, tuple(len(prompt) for prompt in job.prompts), left)
            while left:
                found = [await queue.get()]
                while not queue.empty():
                    found.append(queue.get_nowait())
                parts, failed = [], None
                for entry in found:
                    if entry is None:
                        raise GoneError
                    place, piece = entry
                    if piece.error is not None:
                        failed = piece.error
                        break
                    left -= piece.finish is not None
                    parts.append(_part(place, piece, job.served, told))
                if parts:
                    yield parts
                if failed is not None:
                    raise refusal_of(failed)
        finally:
            gone.remove_done_callback(leave)
            if left:
                self.engine.cancel(job.writings)

    def drain(self) -> None:
        """Take nothing new."""
        self.engine.drain()

    async def _apart(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, without the event loop's waiting for it."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def tells(asked: CompletionRequest | ChatRequest) -> bool:
    """Whether a request wants to be told probabilities."""
    return asked.logprobs is not None and asked.logprobs is not False


def _part(place: int, piece: Piece, served: Served, tells: bool) -> Part:
    drawn = piece.drawn
    token = None if drawn is None else drawn.token
    if not tells or drawn is None or token in served.ends:
        return Part(place, piece.text, token, piece.place, piece.finish)
    word = _word(drawn.token, drawn.logprob or 0.0, served)
    top = tuple(_word(other, logprob, served) for other, logprob in drawn.top)
    return Part(place, piece.text, token, piece.place, piece.finish, word, top)


def _word(token: int, logprob: float, served: Served) -> Word:
    raw = served.bytes_of[token] if token < len(served.bytes_of) else None
    if raw is not None:
        return Word(raw.decode(errors="replace"), raw, logprob)
    text = served.tokenizer.decode([token], skip_special_tokens=False)
    return Word(text, text.encode(), logprob)


def refusal_of(error: Exception) -> RefusalError:
    """What an engine's errors are to a client."""
    if isinstance(error, DrainingError):
        return RefusalError(503, "The server is shutting down: ask another one.", code="shutting_down")
    if isinstance(error, QueueFullError):
        return RefusalError(429, "Too many requests are waiting: try again later.", code="queue_full")
    if isinstance(error, CalmError):
        return RefusalError(400, str(error))
    return RefusalError(500, "The text could not be written; the server's log says why.")
