"""A reader of the anchor's own token ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from calmlm.bases.families import counted
from calmlm.connectors.cross_attention import eager_attention, rotary_angles
from calmlm.errors import DataError
from calmlm.readers.common import Common
from calmlm.readers.inputs import (
    Inputs,
    base_arguments,
    check_one_text,
    length_of,
    mask_of,
    positions_for,
    real_tokens,
)
from calmlm.readers.kept_states import readings_of
from calmlm.state.call import Stream
from calmlm.state.past import Past


@dataclass
class SharedReader(Common):
    """The same token ids (the paper's setting): the cross-attention is plain causal attention."""

    anchor_vocabulary: int = 0

    def read(self, inputs: Inputs, past: Past) -> Stream:
        self._check(inputs.ids)
        read_as = inputs if inputs.texts is None else inputs.texts.apart(inputs)
        past = self.opening.begin(past, read_as.ids.shape[0])
        seeing, attention = None, self.attention(boolean_mask=False)[1]
        if isinstance(inputs.mask, dict):
            mask = inputs.mask[f"cross.{self.name}"]
        elif self.name in (inputs.augmenting or {}):  # a text of its own, whose padding may stand beside real tokens
            mask, seeing, attention = self.masked(_visible(inputs, past))
        else:
            mask = self.mask(inputs.ids, inputs.mask, inputs.positions, past.cross)
        rotation = None
        if self.connector.rotary:
            positions = inputs.positions if inputs.positions is not None else counted(inputs.ids, inputs.mask)
            if positions is None:
                seen = past.cross.get_seq_length() if past.cross is not None else 0
                positions = (torch.arange(inputs.ids.shape[1], device=inputs.ids.device) + seen)[None]
            rotation = rotary_angles(positions if positions.ndim == 2 else positions[0], self.connector.head_dim)
        stream = Stream(mask, rotation, rotation, past.cross, attention, seeing)
        known = past.take_ahead(inputs.ids)
        read = next(iter(known.values())).shape[1] if known else 0
        if read < inputs.ids.shape[1]:
            arguments = self._arguments(read_as, past, read)
            whole = past.cross is None and (inputs.mask is None or getattr(inputs.mask, "ndim", 0) == 2)
            self.run(stream, rows=partial(readings_of, read_as) if whole else None, **arguments)
            if inputs.texts is not None:
                stream.hidden = {layer: inputs.texts.beside(states) for layer, states in stream.hidden.items()}
        for layer, states in known.items():
            new = stream.hidden.get(layer)
            stream.hidden[layer] = states if new is None else torch.cat((states, new), dim=1)
        return stream

    @property
    def packs(self) -> bool:
        """Whether the model can be given rows of several texts as they are."""
        if torch.compiler.is_compiling():  # when it cannot be tried out; a trainer has done so before
            return not self.opening.ids and bool(vars(self.backbone).get("packs", True))
        return not self.opening.ids and self.backbone.packs

    def draft(self, inputs: Inputs, past: Past) -> Tensor:
        """Read tokens before the anchor does; returns the model's own logits for the next one, (B, V_A).

        The states that the connections take are kept in ``past``, for the anchor's next call.
        """
        self._check(inputs.ids)
        past = self.opening.begin(past, inputs.ids.shape[0])
        stream = Stream(None, None, None, None, eager_attention)
        logits = self.run(stream, head=True, **self._arguments(inputs, past, 0))
        past.ahead.extend(inputs.ids, stream.hidden)
        assert logits is not None
        return logits

    def _arguments(self, inputs: Inputs, past: Past, read: int) -> dict[str, Any]:
        """The model's arguments for its tokens but the first ``read``, which lie in its cache already."""
        ids = inputs.ids[:, read:]
        # First, since trying padding out settles who counts positions.
        self.backbone.check_padding(f"augmenting model {self.name!r}", inputs.mask)
        positions = positions_for(self.backbone, inputs.positions, inputs.ids, inputs.mask)
        if positions is None and self.opening.ids:  # padding may stand behind it, which the model would count
            positions = counted(inputs.ids, inputs.mask)
        positions = positions if positions is None else positions[..., read:]
        if self.opening.ids:
            if inputs.mask is None or (isinstance(inputs.mask, Tensor) and inputs.mask.ndim == 2):
                check_one_text(inputs, real_tokens(inputs, self.name), self.name)
        elif past.own is None:
            self.backbone.check_packing(f"augmenting model {self.name!r}", inputs.positions, inputs.mask)
        positions = self.opening.positions(positions)
        mask = self.opening.mask(inputs.mask)
        length = length_of(ids, mask, past.own)
        self.backbone.check_length(f"augmenting model {self.name!r}", length, positions)
        return base_arguments(
            self.backbone,
            input_ids=self.on_device(ids),
            attention_mask=mask_of(inputs.mask, f"augmenting.{self.name}")
            if isinstance(inputs.mask, dict)
            else self.opening.attention(inputs.mask, ids.shape[1]),
            position_ids=positions,
            cache=past.own,
        )

    def mask(self, like: Tensor, attention_mask: Any, positions: Tensor | None, cross: Cache | None) -> Any:
        """The causal cross-attention mask for new positions of the shape (B, T) of ``like``."""
        shape_only = torch.empty((*like.shape[:2], 0), dtype=self.connector.dtype, device=like.device)
        return create_causal_mask(
            config=self.config,
            inputs_embeds=shape_only,
            attention_mask=attention_mask,
            past_key_values=cross,
            position_ids=positions,
            layer_idx=0,
            allow_is_causal_skip=self.connector.null_key is None,
        )

    def _check(self, ids: Tensor) -> None:
        size = self.backbone.vocab_size
        # The comparison waits for the device, so it is made only where a token of the anchor's could fall outside.
        if size >= self.anchor_vocabulary or torch.compiler.is_compiling():
            return
        highest = int(ids.max())
        if highest >= size:
            raise DataError(
                f"Token ids must lie below {size}, the vocabulary of the augmenting model {self.name!r}, but got "
                f"{highest}: give both models a tokenizer whose ids they share."
            )


def _visible(inputs: Inputs, past: Past) -> Tensor:
    """Which columns of the model's text each new position sees, (B, 1, T, S) bool."""
    batch, new = inputs.ids.shape
    start = past.cross.get_seq_length() if past.cross is not None else 0
    columns = torch.arange(start + new, device=inputs.ids.device)
    causal = (columns <= columns[start:, None]).expand(batch, 1, -1, -1)
    return causal if inputs.mask is None else causal & inputs.mask.bool()[:, None, None]
