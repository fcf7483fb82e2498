"""A reader of the same text in tokens of its own."""

from __future__ import annotations

from dataclasses import dataclass

from calmlm.cache import Past
from calmlm.errors import DataError
from calmlm.hooks import Stream
from calmlm.readers.common import Common
from calmlm.readers.inputs import Inputs, base_arguments, check_one_text, real_tokens
from calmlm.rewriting import Rewriter
from calmlm.transcoding import Transcoder


@dataclass
class AlignedReader(Common):
    """The same text in the augmenting model's own tokens."""

    transcoder: Transcoder | Rewriter | None = None

    def read(self, inputs: Inputs, past: Past) -> Stream:
        assert self.transcoder is not None
        frontier = past.frontier
        real = real_tokens(inputs, self.name)
        check_one_text(inputs, real, self.name)
        if frontier.ids is not None and frontier.ids.shape[0] != inputs.ids.shape[0]:
            raise DataError(
                f"input_ids must have as many rows as past_key_values, {frontier.ids.shape[0]}, but got "
                f"{inputs.ids.shape[0]}: begin a new cache for other rows."
            )
        lookback = self.transcoder.lookback
        previous = frontier.previous(frontier.length if lookback is None else lookback, inputs.ids)
        block = self.transcoder(inputs.ids, real, previous)
        new, queries = block.ids.shape[1], inputs.ids.shape[1]
        past.move(frontier.append(block.ids, block.owner))
        frontier.extend(inputs.ids, real)
        mask, seeing, attention = self.masked(frontier.mask(queries))
        rotations = frontier.rotations(queries, new, self.connector.head_dim) if self.connector.rotary else (None, None)
        of_queries, of_keys = rotations
        stream = Stream(mask, of_queries, of_keys, past.cross, attention, seeing)
        if new:
            assert frontier.owner is not None
            assert frontier.tokens is not None
            filled = (frontier.owner >= 0).long()
            positions = self.on_device((filled.cumsum(1) - 1).clamp(min=0)[:, -new:])
            self.backbone.check_length(f"augmenting model {self.name!r}", frontier.width, positions)
            self.run(
                stream,
                **base_arguments(
                    self.backbone,
                    input_ids=self.on_device(frontier.tokens[:, -new:]),
                    attention_mask=self.on_device(filled),
                    position_ids=positions,
                    cache=past.own,
                ),
            )
        return stream
