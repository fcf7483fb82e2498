"""A reader of the prompt alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from calmlm.connectors.cross_attention import eager_attention
from calmlm.errors import DataError
from calmlm.readers.common import Common
from calmlm.readers.inputs import Inputs, base_arguments, check_one_text, real_tokens
from calmlm.readers.kept_states import readings
from calmlm.readers.packing import read_apart
from calmlm.state.call import Stream
from calmlm.state.past import Past


@dataclass
class PromptReader(Common):
    """A decoder that reads the prompt only and is not refreshed (paper, table 5, "m_A as encoder")."""

    def read(self, inputs: Inputs, past: Past) -> Stream:
        if inputs.texts is not None:
            return read_apart(self, inputs, inputs.texts)
        frontier = past.frontier
        stream = Stream(None, None, None, past.cross, eager_attention)
        real = real_tokens(inputs, self.name)
        check_one_text(inputs, real, self.name)
        owner = inputs.ids.new_zeros((inputs.ids.shape[0], 0))
        if frontier.width == 0:
            prompt = real if inputs.prompt is None else real & self._prompt(inputs)
            self.backbone.check_padding(f"augmenting model {self.name!r}", prompt)
            opened = self.opening.begin(Past(), inputs.ids.shape[0])
            positions = (prompt.long().cumsum(1) - 1).clamp(min=0)
            self.run(
                stream,
                rows=partial(readings, inputs.ids, prompt) if past.cross is None else None,
                **base_arguments(
                    self.backbone,
                    input_ids=self.on_device(inputs.ids),
                    attention_mask=self.opening.attention(self.on_device(prompt.long()), prompt.shape[1]),
                    position_ids=self.on_device(self.opening.positions(positions)),
                    cache=opened.own,
                ),
            )
            owner = torch.zeros_like(inputs.ids).masked_fill(~prompt, -1)
        frontier.extend(inputs.ids, real, owner)
        stream.visible = frontier.mask(inputs.ids.shape[1])
        stream.mask, stream.seeing, stream.attention = self.masked(stream.visible)
        return stream

    def _prompt(self, inputs: Inputs) -> Tensor:
        """The prompt among the tokens of this call, which may hold generated ones after it."""
        assert inputs.prompt is not None
        length, prompt = inputs.ids.shape[1], inputs.prompt.bool()
        if prompt.shape[1] > length:
            raise DataError(
                f"The prompt must come in one call, because the augmenting model {self.name!r} reads it at once, but "
                f"got {length} of its {prompt.shape[1]} tokens: leave prefill_chunk_size out."
            )
        return nn.functional.pad(prompt, (0, length - prompt.shape[1]))
