"""What an augmenting model makes of texts while a composition reads them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calmlm.bases.structure import accepts
from calmlm.communication.excerpts import Row
from calmlm.communication.tokenwise import token_nats
from calmlm.readers import Inputs
from calmlm.state.call import Call, Stream
from calmlm.state.past import Past

__all__ = ["Ear"]


class Ear:
    """Hears what an augmenting model makes of the completions in calls of a composition, with the model's own head.

    Args:
        model: the composition.
        name: of the augmenting model.
        count: how many rows there are.

    Attributes:
        rows: those of the next call, each with its place among all.
        nats: the completions' negative log-probabilities.
        tokens: what the model read of each row, and where the completion begins in it.
    """

    def __init__(self, model: Any, name: str, count: int) -> None:
        self.base, self.reader = model.augmenting[name], model.model.reader(name)
        self.rows: Sequence[tuple[int, Row]] = ()
        self.nats = [0.0] * count
        self.tokens: list[Row | None] = [None] * count

    def __enter__(self) -> Ear:
        self.reader.read = self._read
        return self

    def __exit__(self, *_: Any) -> None:
        del self.reader.read  # the class's own again

    def known(self, own: Sequence[Row], opening: int) -> dict[int, float]:
        """What was heard of the rows of which the model has read these tokens, behind the first ``opening``."""
        return {
            index: self.nats[index]
            for index, (ids, start) in enumerate(own)
            if self.tokens[index] == (ids[opening:], start - opening)
        }

    def _read(self, inputs: Inputs, past: Past) -> Stream:
        reader = copy.copy(self.reader)
        del reader.read
        reader.run = partial(self._run, inputs.ids, past)
        return reader.read(inputs, past)

    def _run(self, ids: Tensor, past: Past, stream: Stream, **given: Any) -> None:
        rows, columns, wanted = [], [], []
        for row, (index, (own, start)) in enumerate(self.rows):
            tokens, owners, places = _stream(past.frontier, row, len(own), ids)
            self.tokens[index] = tokens, sum(owner < start for owner in owners)
            for place in range(1, len(tokens)):
                if owners[place] >= start:
                    rows.append(row)
                    columns.append(places[place - 1])
                    wanted.append(tokens[place])
        whole = self.reader.first.reads_distribution
        if not whole and accepts(self.base, "logits_to_keep"):
            needed = {column: index for index, column in enumerate(sorted(set(columns)))}
            given["logits_to_keep"] = torch.tensor(list(needed), device=ids.device)
            columns = [needed[column] for column in columns]
        self.reader.slot.call = Call({self.reader.name: stream})
        try:
            logits = self.base(**given).logits
        finally:
            self.reader.slot.call = None
        if whole:
            stream.hidden.update(dict.fromkeys(self.reader.layers, self.reader.said(logits)))
        losses = token_nats(logits[rows, columns], torch.tensor(wanted, device=logits.device)).tolist()
        for row, loss in zip(rows, losses, strict=True):
            self.nats[self.rows[row][0]] += loss


def _stream(frontier: Any, row: int, length: int, ids: Tensor) -> tuple[list[int], list[int], list[int]]:
    """The tokens of one row as its model has read them: their ids, their owners and the columns that they stand in."""
    if frontier.tokens is None:  # the anchor's own
        return ids[row, :length].tolist(), list(range(length)), list(range(length))
    if frontier.chosen is not None:
        columns = [column for column in frontier.chosen[row].tolist() if column >= 0]
    else:
        columns = (frontier.owner[row] >= 0).nonzero()[:, 0].tolist()
    offset = frontier.width - frontier.tokens.shape[1]
    return (
        frontier.tokens[row, columns].tolist(),
        frontier.owner[row, columns].tolist(),
        [column - offset for column in columns],
    )
