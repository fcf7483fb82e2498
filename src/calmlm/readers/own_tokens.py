"""A reader of the same text in its own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from calmlm.readers.common import Common
from calmlm.readers.inputs import Inputs, base_arguments, catch_up
from calmlm.readers.kept_states import readings
from calmlm.readers.packing import read_apart
from calmlm.state.call import Stream
from calmlm.state.frontier import NOBODY
from calmlm.state.past import Past
from calmlm.tokens.stream import Rewriter
from calmlm.tokens.transcoding import Block, Transcoder


@dataclass
class AlignedReader(Common):
    """The same text in the augmenting model's own tokens."""

    in_graphs: ClassVar[bool] = False  # every step works on text: it has other shapes and other branches each time
    transcoder: Transcoder | Rewriter | None = None

    @torch.compiler.disable
    def read(self, inputs: Inputs, past: Past) -> Stream:
        assert self.transcoder is not None
        if inputs.texts is not None:
            return read_apart(self, inputs, inputs.texts)
        past = self.opening.begin(past, inputs.ids.shape[0])
        frontier = past.frontier
        real = catch_up(inputs, past, self.name)
        block = self._written(inputs.ids, real, past)
        new, queries = block.ids.shape[1], inputs.ids.shape[1]
        past.move(frontier.append(block.ids, block.owner))
        frontier.extend(inputs.ids, real)
        visible = frontier.mask(queries)
        mask, seeing, attention = self.masked(visible)
        rotations = frontier.rotations(queries, new, self.connector.head_dim) if self.connector.rotary else (None, None)
        assert frontier.owner is not None
        owner = frontier.owner, frontier.length
        stream = Stream(mask, rotations[0], rotations[1], past.cross, attention, seeing, visible, owner)
        if new:
            assert frontier.tokens is not None
            filled = (frontier.owner >= 0).long()
            positions = self.on_device((filled.cumsum(1) - 1).clamp(min=0)[:, -new:])
            self.backbone.check_padding(f"augmenting model {self.name!r}", filled)
            positions = self.opening.positions(positions)
            self.backbone.check_length(f"augmenting model {self.name!r}", frontier.width + past.opening, positions)
            whole = past.cross is None
            self.run(
                stream,
                rows=partial(readings, frontier.tokens[:, -new:], filled[:, -new:]) if whole else None,
                **base_arguments(
                    self.backbone,
                    input_ids=self.on_device(frontier.tokens[:, -new:]),
                    attention_mask=self.opening.attention(self.on_device(filled), new),
                    position_ids=positions,
                    cache=past.own,
                ),
            )
        return stream

    def room(self, ids: Tensor, past: Past) -> int:
        """How many of the next tokens (1, T) the model has positions for, after what it has read."""
        most = self.backbone.max_positions
        if most is None:
            return ids.shape[1]
        block = self._written(ids, torch.ones_like(ids, dtype=torch.bool), past)
        free = (
            most - past.opening - (0 if past.frontier.owner is None else int((past.frontier.owner[0] != NOBODY).sum()))
        )
        return ids.shape[1] if block.ids.shape[1] <= free else int(block.owner[0, max(0, free)])

    def _written(self, ids: Tensor, real: Tensor, past: Past) -> Block:
        """The anchor's new tokens in the model's own."""
        assert self.transcoder is not None
        lookback = self.transcoder.lookback
        previous = past.frontier.previous(past.frontier.length if lookback is None else lookback, ids)
        return self.transcoder(ids=ids, real=real, previous=previous)  # by name, as the connectors' masks are
