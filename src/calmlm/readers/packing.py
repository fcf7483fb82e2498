"""Several texts in one row, told apart by positions that begin anew: a model with tokens of its own reads one a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calmlm.connectors.cross_attention import Rotation
from calmlm.errors import DataError
from calmlm.readers.inputs import Inputs, given_of, prompt_of
from calmlm.state.call import Stream
from calmlm.state.frontier import NOBODY
from calmlm.state.past import Past

__all__ = ["Texts", "prompt_mask_of", "read_apart", "starts_of", "texts_of"]


class Reads(Protocol):
    """A reader of texts that are no longer than their rows."""

    def read(self, inputs: Inputs, past: Past) -> Stream:
        """Return the stream, its hidden states filled in."""
        ...

    def masked(self, visible: Tensor) -> tuple[Tensor | None, Tensor | None, Any]:
        """From (B, 1, T, S) bool: the mask that the attention takes, which rows see anything (B, T), the attention."""
        ...


@dataclass(frozen=True)
class Texts:
    """Where the N texts of B packed rows of T columns stand, in the order of rows and columns.

    Attributes:
        number: (B, T) int64, which text each column belongs to.
        place: (B, T) int64, which of its text's tokens each column holds.
        row: (N,) int64, in which row each text stands.
        start: (N,) int64, in which column it begins.
        length: (N,) int64, its tokens.
        anew: whether the positions of all texts begin with 0.
    """

    number: Tensor
    place: Tensor
    row: Tensor
    start: Tensor
    length: Tensor
    anew: bool

    def split(self, part: Tensor) -> Tensor:
        """One text a row: (B or 1, T) to (N, longest), filled on the right with zeros."""
        columns = torch.arange(int(self.length.max()), device=self.start.device)
        inside = columns < self.length[:, None]
        source = (self.start[:, None] + columns).clamp(max=self.number.shape[1] - 1)
        part = part.expand(self.number.shape[0], -1).to(source.device)
        return part[self.row[:, None], source].masked_fill(~inside, 0)

    def apart(self, inputs: Inputs) -> Inputs:
        """What a call on the same texts would be given if each had a row of its own."""
        width = self.number.shape[1]

        def told(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            return self.split(nn.functional.pad(part.bool()[:, :width], (0, max(0, width - part.shape[1]))))

        whole = self.split(torch.ones_like(self.number))
        positions = None if self.anew or inputs.positions is None else self.split(inputs.positions)
        return replace(
            inputs,
            ids=self.split(inputs.ids),
            mask=None if bool(whole.all()) else whole,
            positions=positions,
            prompt=told(inputs.prompt),
            told=told(inputs.told),
            augmenting=None,
            composed=None,
            texts=None,
        )

    def beside(self, states: Tensor) -> Tensor:
        """States of the texts' tokens (N, longest, D), each in its token's column, (B, T, D)."""
        return states[self.number.to(states.device), self.place.to(states.device)]

    def same(self, owner: Tensor) -> Tensor:
        """Which columns are of one text with the tokens that own something, (B, T, S) bool for owners (B, S)."""
        theirs = self.number.gather(1, owner.clamp(min=0, max=self.number.shape[1] - 1))
        return self.number[:, :, None] == theirs[:, None]

    def places(self, owner: Tensor) -> Tensor:
        """The places of owners (B, S) in their texts."""
        return self.place.gather(1, owner.clamp(min=0, max=self.place.shape[1] - 1))

    def together(self, stream: Stream, visible: Tensor, owner: Tensor, reader: Reads) -> Stream:
        """The stream of packed rows, from that of the same texts with a row for each.

        Args:
            stream: of the texts.
            visible: (N, 1, longest, S) bool, what each of a text's tokens sees.
            owner: (N, S) int64, the tokens that own what is seen.
            reader: whose it is.
        """
        batch, width = self.number.shape
        text, column = (owner != NOBODY).nonzero(as_tuple=True)
        rows = self.row[text]
        counts = torch.bincount(rows, minlength=batch)
        # Texts are in the order of their rows, so that what belongs to a row follows each other.
        place = torch.arange(len(text), device=text.device) - (counts.cumsum(0) - counts)[rows]
        texts, columns, owners = (owner.new_full((batch, int(counts.max())), NOBODY) for _ in range(3))
        texts[rows, place], columns[rows, place] = text, column
        owners[rows, place] = owner[text, column] + self.start[text]
        real = texts != NOBODY
        source = texts.clamp(min=0), columns.clamp(min=0)
        number, places = self.number[:, :, None], self.place[:, :, None]
        sees = visible[:, 0][number, places, source[1][:, None]] & (number == texts[:, None])
        mask, seeing, attention = reader.masked(sees[:, None])

        def chosen(states: Tensor) -> Tensor:
            found = states[source[0].to(states.device), source[1].to(states.device)]
            return found.masked_fill(~real.to(states.device)[..., None], 0)

        return Stream(
            mask,
            _turned(stream.rotation, self.number, self.place),
            _turned(stream.key_rotation, *source),
            None,
            attention,
            seeing,
            sees[:, None],
            (owners, width),
            {layer: chosen(states) for layer, states in stream.hidden.items()},
        )


def _turned(rotation: Rotation | None, text: Tensor, column: Tensor) -> Rotation | None:
    """Angles (N, 1, S, d) of these columns of these texts, (B, 1, S', d)."""
    if rotation is None:
        return None
    cos, sin = (part[text, 0, column][:, None] for part in rotation)
    return cos, sin


def read_apart(reader: Reads, inputs: Inputs, texts: Texts) -> Stream:
    """Let a model that owns what it sees read packed rows, one text in each row."""
    past = Past()
    stream = reader.read(texts.apart(inputs), past)
    owner = past.frontier.owner
    assert owner is not None
    assert stream.visible is not None
    return texts.together(stream, stream.visible, owner, reader)


@torch.compiler.disable  # it waits for the device
def texts_of(inputs: Inputs) -> Texts | None:
    """The texts of packed rows; None where each row holds one.

    Raises:
        DataError: for a mask beside positions that begin anew, where models mix the texts of a row.
    """
    positions, batch = inputs.positions, inputs.ids.shape[0]
    if positions is None or positions.ndim != 2 or positions.shape[-1] < 2 or isinstance(inputs.mask, dict):
        return None
    if inputs.mask is not None:
        if inputs.mask.ndim == 2 and bool(_begins_anew(positions, inputs.mask).any()):
            raise DataError(
                "attention_mask must be left out where several texts share a row, because models mix them where there "
                "is one, but got one beside position_ids that begin anew: let positions begin anew at padding too."
            )
        return None
    starts = starts_of(inputs.ids, None, positions)
    count = starts.sum()
    if int(count) == batch:
        return None
    row, start = starts.nonzero(as_tuple=True)
    end = torch.cat((start[1:], start.new_zeros(1)))
    length = torch.where(end == 0, starts.shape[1], end) - start  # the next text of the last one is in another row
    number = starts.flatten().cumsum(0).view(starts.shape) - 1
    place = torch.arange(starts.shape[1], device=starts.device) - start[number]
    first = positions.to(starts.device).expand(batch, -1)[row, start]
    return Texts(number, place, row, start, length, not bool(first.any()))


def starts_of(like: Tensor, mask: Any, positions: Tensor | None) -> Tensor:
    """Where texts begin, (B, T) bool: at the first token of a row that is no padding, and where positions begin anew.

    Args:
        like: (B, T), the new tokens or their labels.
        mask: (B, past + T), or None; with one, each row is one text.
        positions: (B or 1, T) int64, or None.
    """
    starts = torch.zeros_like(like, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask.to(like.device).bool()
        first = real & (real.long().cumsum(1) == 1)
        return first[:, -like.shape[1] :]
    starts[:, 0] = True
    if mask is None and positions is not None and positions.ndim == 2:
        # As transformers tells them apart.
        starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).to(like.device)
    return starts


def prompt_mask_of(batch: Mapping[str, Any], *, first: bool) -> Tensor:
    """The ``prompt_mask`` of a batch whose labels do not reach the composition, (B, T) bool.

    Args:
        batch: with ``labels`` (B, T) int64, and ``attention_mask`` and ``position_ids`` if there are any.
        first: whether only what stands before the first label of a text is meant, and not all that has no label.
    """
    labels = batch["labels"]
    starts = starts_of(labels, batch.get("attention_mask"), batch.get("position_ids"))
    return prompt_of(labels, starts) if first else given_of(labels, None, starts)


def _begins_anew(positions: Tensor, mask: Tensor) -> Tensor:
    """Where the position of a token does not lie behind that of the one before, padding left out, (B, T) bool."""
    real = mask[:, -positions.shape[1] :].bool().to(positions.device)
    places = torch.arange(positions.shape[1], device=positions.device)
    before = torch.where(real, places, -1).cummax(1).values
    before = nn.functional.pad(before[:, :-1], (1, 0), value=-1)
    positions = positions.expand(len(real), -1)
    return real & (before >= 0) & (positions <= positions.gather(1, before.clamp(min=0)))
