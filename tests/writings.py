"""Texts that an engine writes, without a server around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from calmlm.serving.batching import Text
from calmlm.serving.catalogue import Catalogue
from calmlm.serving.engine import Engine
from calmlm.serving.next_token import Chooser, Sampling
from calmlm.serving.writing import Piece, Writing
from calmlm.tokens.transcript import Transcript
from compositions import own, tiny_composition

GREEDY = Sampling(temperature=0, logprobs=2)
SAMPLED = Sampling(temperature=1.3, top_p=0.98, seed=5, logprobs=2)


class Heard:
    """One text, and what is heard of it.

    Args:
        served: where its model is.
        name: of the model.
        ids: the prompt.
        room: how many tokens may follow.
        stops: strings that end it.
        ends: tokens that end it, by default the model's.
        then: is called behind each piece with the number of pieces.
    """

    def __init__(
        self,
        served: Catalogue,
        name: str,
        ids: Sequence[int],
        room: int,
        *,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
        ends: frozenset[int] | None = None,
        grammar: Any = None,
        then: Callable[[int], Any] | None = None,
    ) -> None:
        model = served.models[name]
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        self.then = then
        self.writing = Writing(
            Text(list(ids), len(ids)),
            model.lane,
            Chooser(model.lane.model, ids, sampling, grammar, model.lane.device),
            Transcript(model.tokenizer, ids, stops),
            model.ends if ends is None else ends,
            room,
            self._hear,
            name,
            model.beside,
            model.context(len(ids)),
        )

    def _hear(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish is not None or piece.error is not None:
            self.done.set()
        if self.then is not None:
            self.then(len(self.pieces))

    def wait(self) -> list[tuple[Any, ...]]:
        """What was written, once it is: text, token, place and end of each piece."""
        assert self.done.wait(30), "it did not come"
        assert self.pieces[-1].error is None, self.pieces[-1].error
        return [(piece.text, piece.drawn.token, piece.place, piece.finish) for piece in self.pieces if piece.drawn]

    @property
    def tokens(self) -> list[int]:
        """What was written, once it is."""
        return [token for _, token, _, _ in self.wait()]

    @property
    def logprobs(self) -> torch.Tensor:
        """Of the tokens that were written and of the likeliest ones, (tokens, 3)."""
        drawn = [piece.drawn for piece in self.pieces if piece.drawn]
        return torch.tensor([[one.logprob or 0.0, *(value for _, value in one.top)] for one in drawn])


def other(alignment: str, kind: str, **options: Any) -> Any:
    """A composition whose augmenting model has a tokenizer of this kind."""
    options = {"rotary": True, **own(kind, "bytes-large"), **options}
    return tiny_composition("llama", "mistral", alignment=alignment, **options)


@contextmanager
def writing(served: Catalogue, *, drafts: int = 0, max_batch: int = 8) -> Iterator[Engine]:
    """A running engine."""
    engine = Engine(max_batch, 64, served.max_length, drafts)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def write(served: Catalogue, name: str, ids: Sequence[int], room: int, *, drafts: int = 0, **options: Any) -> Heard:
    """One text that is written alone."""
    heard = Heard(served, name, ids, room, **options)
    with writing(served, drafts=drafts) as engine:
        engine.submit([heard.writing])
        heard.wait()
    return heard
