"""How long a text may be: for each model of a composition in the tokens that this model reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from calmlm.tokens.alignment import LOOKBACK
from calmlm.tokens.live_text import OwnWriter
from calmlm.tokens.stream import Rewriter
from calmlm.tokens.transcoding import Transcoder

# What architectures call it. Those with relative positions only (Bloom) state none.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


def context_length(model: Any) -> int | None:
    """The shortest context of the models that read every one of the anchor's tokens; None where none states one.

    It is about the models that are switched on, as is all that is asked of a composition here.
    """
    return _shortest(model, ["", *_reading(model, "tokens")])


def prompt_length(model: Any) -> int | None:
    """How many of the anchor's tokens a prompt may have; models with ``refresh=False`` read nothing else."""
    return _shortest(model, ["", *_reading(model, "tokens"), *_reading(model, "prompt")])


def own_contexts(model: Any) -> list[OwnContext]:
    """The contexts of the augmenting models that read the text in tokens of their own."""
    found = []
    for name in _reading(model, "text"):
        length = _shortest(model, [name])
        if length is not None:
            learned = model.model.backbone(name).max_positions is not None
            backbone = model.model.backbone(name)
            found.append(OwnContext(name, length, learned, model.model.transcoders[name], backbone.branches))
    return found


def stated_length(config: Any) -> int | None:
    """How many tokens a language model can take, from its configuration; None where that states nothing."""
    config = config.get_text_config(decoder=True)
    return next((value for name in NAMES if isinstance(value := getattr(config, name, None), int)), None)


@dataclass(frozen=True)
class OwnContext:
    """The context of an augmenting model that has tokens of its own.

    Attributes:
        name: of the model.
        length: how many of its own tokens of a text it can take.
        learned: whether its positions end there, so that it cannot read on.
        writer: writes the text in its tokens.
        branches: whether it can take back what it has read.
    """

    name: str
    length: int
    learned: bool
    writer: Transcoder | Rewriter
    branches: bool = True

    def readable(self, ids: Sequence[int], given: Sequence[bool] | None = None) -> int:
        """How many of a text's tokens, the anchor's, the model can read, at each of them and at the end.

        Args:
            ids: of the text.
            given: which of them were given and not generated; None for all.
        """
        owners = self._owners(ids, 0)
        if not isinstance(self.writer, OwnWriter):
            return len(ids) if len(owners) <= self.length else owners[self.length]
        # A part of a text, or one that is cut where its prompt ends, takes a few tokens more than the whole.
        if len(owners) <= (self.length if given is None else self.length // 2):
            return len(ids)
        told = np.ones(len(ids), dtype=bool) if given is None else np.array(given)
        stream = self.writer.resume(np.zeros(0, dtype=np.int64), told[:0], branches=self.branches)
        keep = len(ids)
        for place in range(len(ids)):
            stream.read(int(ids[place]), bool(told[place]))
            predicts = place + 1 == len(ids) or not (told[place] and told[place + 1])
            if predicts and stream.settled + len(stream.pending()) > self.length:
                keep = place
                break

        def taken(count: int) -> int:
            return (self._latest(ids[:count], told[:count]) or 0) if count else 0

        if keep < len(ids) and taken(keep) > self.length:  # within what was given
            keep = bisect_right(range(keep), self.length, key=taken) - 1
            while taken(keep) > self.length:
                keep -= 1
        return keep

    def count(self, ids: Sequence[int], start: int = 0) -> int:
        """How many of its own tokens the model reads for ``ids[start:]``, behind those before."""
        return len(self._owners(ids, start))

    def latest(self, ids: Sequence[int], given: int) -> int | None:
        """How many of its own tokens the model reads for a text of which the first tokens were given.

        None where these are not written anew as the text goes on, so that ``count`` can go on as well.
        """
        return self._latest(ids, np.arange(len(ids)) < given)

    def _latest(self, ids: Sequence[int], told: np.ndarray) -> int | None:
        """The same for a text of which those tokens were given that ``told`` (n,) bool marks."""
        if not isinstance(self.writer, OwnWriter):
            return None
        stream = self.writer.resume(np.array(ids[:-1], dtype=np.int64), told[:-1], branches=self.branches)
        stream.read(ids[-1], bool(told[-1]))
        return stream.settled + len(stream.pending())

    def _owners(self, ids: Sequence[int], start: int) -> list[int]:
        """Which of ``ids[start:]`` each of the model's tokens belongs to."""
        if isinstance(self.writer, OwnWriter):  # what stands before may be written otherwise now
            owners = [owner - start for _, owner in self.writer.write(ids)]
            return owners[len(self.writer.write(ids[:start])) if start else 0 :]
        if isinstance(self.writer, Rewriter) and not start:
            return [owner for _, owner in self.writer.write(ids)]
        lookback = LOOKBACK if self.writer.lookback is not None else start
        before = list(ids[max(0, start - lookback) : start])
        past = torch.tensor([[-1] * (lookback - len(before)) + before], dtype=torch.long)
        new = torch.tensor([list(ids[start:])], dtype=torch.long)
        if isinstance(self.writer, Transcoder):
            past, new = past.to(self.writer.flat.device), new.to(self.writer.flat.device)
        return self.writer(new, torch.ones_like(new, dtype=torch.bool), past).owner[0].tolist()


class EndOfContext(StoppingCriteria):
    """Ends a text with the first token that an augmenting model has no room for in its own context.

    That token was still made from what both models have read. Several rows are the beams of one text: what generation
    fills up an ended row with would be read on with.

    Args:
        contexts: of the models.
        given: how many tokens the prompt has.

    Attributes:
        full: the context that ended a text, or None.
    """

    def __init__(self, contexts: Sequence[OwnContext], given: int) -> None:
        self.contexts, self.given = contexts, given
        self.full: OwnContext | None = None
        self.length = 0  # of the text so far, and what the models have read of it
        self.counts = [0] * len(contexts)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows of (B, T) ids end, (B,) bool."""
        if not self.contexts:  # and nothing to wait for the device for
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        rows = input_ids.tolist()
        ends = [self._ends(row, self.length if len(rows) == 1 else 0) for row in rows]
        self.length = input_ids.shape[1]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)

    def _ends(self, ids: list[int], start: int) -> bool:
        """Whether a text of which ``start`` tokens are counted does not fit any more."""
        for index, context in enumerate(self.contexts):
            latest = context.latest(ids, self.given)
            if latest is None:
                latest = context.count(ids, start) + (self.counts[index] if start else 0)
            self.counts[index] = latest
            if self.counts[index] > context.length:
                self.full = context
                return True
        return False


def _reading(model: Any, what: str) -> list[str]:
    """The augmenting models that are switched on and read the anchor's tokens, their own, or the prompt."""
    composed = model.model
    active = composed.active if composed.enabled else ()
    return [name for name, entry in model.config.augmenting.items() if name in active and entry["reads"] == what]


def _shortest(model: Any, names: Sequence[str]) -> int | None:
    """The shortest context of models of a composition, the anchor under an empty name, less what each of them reads
    before a text."""
    lengths: list[int] = []
    for name in names:
        base = model.augmenting[name] if name else model.anchor
        # Some positions that a configuration states are no text's: RoBERTa's begin behind the padding id.
        before = len(model.model.opening(name)) if name else 0
        found = (stated_length(base.config), model.model.backbone(name).max_positions)
        lengths += [length - before for length in found if length is not None]
    return min(lengths, default=None)
