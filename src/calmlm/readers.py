"""How an augmenting model reads: the same tokens, the same text in its own, or a prompt or image at once.

A reader runs its model for one call and prepares the ``Stream`` from which the anchor's hooks take keys and values.
What it knows of earlier calls lies in the cache; readers themselves keep no state between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calmlm.backbone import Backbone, first_line
from calmlm.cache import Past
from calmlm.connector import CrossAttention, eager_attention, rotary_angles
from calmlm.connectors import Connector
from calmlm.errors import DataError
from calmlm.frontier import NOBODY
from calmlm.hooks import Call, Slot, Stream
from calmlm.rewriting import Rewriter
from calmlm.transcoding import Transcoder


@dataclass(frozen=True)
class Inputs:
    """What a composition is called with.

    Attributes:
        ids: (B, T) int64, the anchor's new tokens; None only while the composition is disabled.
        mask: (B, past + T), a 4-D mask, a dictionary made by ``create_masks_for_generate``, or None.
        positions: (B or 1, T) int64, or None.
        prompt: (B, T or fewer) bool, which tokens are the prompt, or None for all; read by ``PromptReader`` alone.
        augmenting: inputs of augmenting encoders, by name, or None.
    """

    ids: Any
    mask: Any
    positions: Tensor | None
    prompt: Tensor | None
    augmenting: dict[str, dict[str, Any]] | None


class Reader(Protocol):
    """Runs one augmenting model for one call."""

    def read(self, inputs: Inputs, past: Past) -> Stream:
        """Return the stream, its hidden states filled in."""
        ...


@dataclass
class Common:
    """What every reader holds: its name and model, the connected layers, the first connector, the configuration."""

    name: str
    model: nn.Module
    backbone: Backbone
    layers: tuple[int, ...]
    first: Connector
    config: PreTrainedConfig
    slot: Slot

    @property
    def connector(self) -> CrossAttention:
        """The cross-attention of the first connection; all have the same options."""
        return self.first.attention

    def run(self, stream: Stream, **arguments: Any) -> None:
        """Run the model without gradients; hooks on its connected layers put their outputs into ``stream``."""
        self.slot.call = Call({self.name: stream})
        try:
            with torch.no_grad():
                if self.first.reads_distribution:
                    distribution = self.model(**arguments).logits.softmax(-1, dtype=torch.float32)
                    stream.hidden.update(dict.fromkeys(self.layers, distribution))
                else:
                    self.backbone.decoder(**arguments)
        finally:
            self.slot.call = None

    def attention(self, boolean_mask: bool) -> tuple[str, Any]:
        """The kind of attention and its function; only sdpa and eager take a mask of our own."""
        kind = self.config._attn_implementation
        if boolean_mask and kind not in ("eager", "sdpa"):
            kind = "sdpa"
        return kind, ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)

    def masked(self, visible: Tensor) -> tuple[Tensor | None, Tensor | None, Any]:
        """From (B, 1, T, S) bool: the mask that the attention takes, which rows see anything (B, T), the attention.

        None for both where everything is visible.
        """
        kind, attention = self.attention(boolean_mask=True)
        if visible.shape[2] == 1 and visible.shape[3] and bool(visible.all()):
            return None, None, attention  # one step of decoding, as a rule
        anything = visible.any(-1, keepdim=True)
        seeing = anything[:, 0, :, 0]
        if self.connector.null_key is None:
            # A row that sees nothing must see something for softmax to be defined; its result is then dropped.
            visible = visible | ~anything
        if kind == "sdpa":
            return visible, seeing, attention
        dtype = self.connector.dtype
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return additive.masked_fill(~visible, torch.finfo(dtype).min), seeing, attention

    def on_device(self, value: Any) -> Any:
        return value.to(next(self.backbone.decoder.parameters()).device) if isinstance(value, Tensor) else value


@dataclass
class SharedReader(Common):
    """The same token ids (the paper's setting): the cross-attention is plain causal attention."""

    anchor_vocabulary: int = 0

    def read(self, inputs: Inputs, past: Past) -> Stream:
        self._check(inputs.ids)
        if isinstance(inputs.mask, dict):
            mask = inputs.mask[f"cross.{self.name}"]
        else:
            mask = self.mask(inputs.ids, inputs.mask, inputs.positions, past.cross)
        rotation = None
        if self.connector.rotary:
            positions = inputs.positions if inputs.positions is not None else counted(inputs.ids, inputs.mask)
            if positions is None:
                seen = past.cross.get_seq_length() if past.cross is not None else 0
                positions = (torch.arange(inputs.ids.shape[1], device=inputs.ids.device) + seen)[None]
            rotation = rotary_angles(positions if positions.ndim == 2 else positions[0], self.connector.head_dim)
        stream = Stream(mask, rotation, rotation, past.cross, self.attention(boolean_mask=False)[1])
        positions = positions_for(self.backbone, inputs.positions, inputs.ids, inputs.mask)
        length = length_of(inputs.ids, inputs.mask, past.own)
        self.backbone.check_length(f"augmenting model {self.name!r}", length, positions)
        self.run(
            stream,
            **base_arguments(
                self.backbone,
                input_ids=self.on_device(inputs.ids),
                attention_mask=mask_of(inputs.mask, f"augmenting.{self.name}"),
                position_ids=positions,
                cache=past.own,
            ),
        )
        return stream

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


@dataclass
class EncoderReader(Common):
    """A text, image or sound encoder with inputs of its own.

    One item per row, visible from the first token on; or, with ``at``, several items per row, each visible from the
    token at which it stands.
    """

    def read(self, inputs: Inputs, past: Past) -> Stream:
        frontier = past.frontier
        stream = Stream(None, None, None, past.cross, eager_attention)
        owner = inputs.ids.new_zeros((inputs.ids.shape[0], 0))
        given = dict((inputs.augmenting or {}).get(self.name) or {})
        if frontier.width == 0:
            frontier.given = given
            owner = self._encode(stream, dict(given), inputs.ids)
        elif given and not _same(given, frontier.given):
            raise DataError(
                f"The augmenting model {self.name!r} must be given its inputs once, in the first call, but got others "
                f"with past_key_values: give all of them at the beginning, with 'at', or begin a new cache."
            )
        real = real_tokens(inputs, self.name)
        if self.connector.rotary and bool((owner >= inputs.ids.shape[1]).any() & ~real[:, -1].all()):
            raise DataError(
                f"The padding of a row must come in one call with its first token where items of {self.name!r} stand "
                f"further on, but got a call that ends in padding: leave prefill_chunk_size out, or make it larger."
            )
        frontier.extend(inputs.ids, real, owner)
        stream.mask, stream.seeing, stream.attention = self.masked(frontier.mask(inputs.ids.shape[1]))
        if self.connector.rotary:
            stream.rotation, stream.key_rotation = frontier.rotations(
                inputs.ids.shape[1], owner.shape[1], self.connector.head_dim
            )
        return stream

    def _encode(self, stream: Stream, given: dict[str, Any], ids: Tensor) -> Tensor:
        """Run the encoder; returns the owners of its positions."""
        at = given.pop("at", None)
        if not given:
            raise DataError(
                f"The augmenting model {self.name!r} must be given inputs of its own, but got none: pass "
                f"augmenting_inputs={{{self.name!r}: {{...}}}} with what its encoder takes."
            )
        try:
            self.run(stream, **{key: self.on_device(value) for key, value in given.items()})
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise DataError(
                f"augmenting_inputs[{self.name!r}] must be what {type(self.model).__name__} takes, but with "
                f"{', '.join(given)} it failed ({first_line(error)}): see its forward method."
            ) from error
        return self._spread(stream, given, at, ids)

    def _spread(self, stream: Stream, given: dict[str, Any], at: Any, ids: Tensor) -> Tensor:
        """Give each row its encoded items (several rows of a beam share them); returns what token each position is at.

        ``at`` is (rows, items) int64, the column of each item's token, -1 for an item that is not there.
        """
        states = next(iter(stream.hidden.values()))
        if states.ndim == 2:  # one distribution for the whole item
            stream.hidden = {layer: hidden[:, None] for layer, hidden in stream.hidden.items()}
            states = states[:, None]
        if at is None:
            at = torch.zeros((states.shape[0], 1), dtype=torch.long)
        self._check_items(at, states.shape[0], ids.shape[0])
        at = at.to(ids.device)
        given_rows, items = at.shape
        times = ids.shape[0] // given_rows
        for layer, hidden in stream.hidden.items():
            stream.hidden[layer] = hidden.reshape(given_rows, -1, hidden.shape[-1]).repeat_interleave(times, 0)
        owner = at[:, :, None].expand(-1, -1, states.shape[1])
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape[-1] == states.shape[1]:
            mask = mask.to(ids.device).view(given_rows, items, -1)
            owner = owner.masked_fill(mask == 0, NOBODY)
        return owner.reshape(given_rows, -1).repeat_interleave(times, 0)

    def _check_items(self, at: Any, items: int, rows: int) -> None:
        whole = isinstance(at, Tensor) and not at.is_floating_point() and at.dtype != torch.bool
        if not whole or at.ndim != 2 or at.numel() != items or bool((at < -1).any()):
            shape = tuple(at.shape) if isinstance(at, Tensor) else type(at).__name__
            raise DataError(
                f"augmenting_inputs[{self.name!r}]['at'] must hold a whole number for each of the {items} items, as a "
                f"tensor of shape (rows, items per row), but got {shape}: give the column of each item's token, or -1."
            )
        if at.shape[0] == 0 or rows % at.shape[0]:
            raise DataError(
                f"augmenting_inputs[{self.name!r}] must hold one item per row, or say with 'at' which tokens the items "
                f"belong to, but got {at.shape[0]} for {rows} rows: pass one each, or 'at'."
            )


def prompt_of(labels: Tensor) -> Tensor:
    """Which tokens belong to the prompt: those before the first label; (B, T) int64 to (B, T) bool."""
    return (labels != -100).cumsum(-1) == 0


@dataclass
class PromptReader(Common):
    """A decoder that reads the prompt only and is not refreshed (paper, table 5, "m_A as encoder")."""

    def read(self, inputs: Inputs, past: Past) -> Stream:
        frontier = past.frontier
        stream = Stream(None, None, None, past.cross, eager_attention)
        real = real_tokens(inputs, self.name)
        check_one_text(inputs, real, self.name)
        owner = inputs.ids.new_zeros((inputs.ids.shape[0], 0))
        if frontier.width == 0:
            prompt = real if inputs.prompt is None else real & self._prompt(inputs)
            self.run(
                stream,
                **base_arguments(
                    self.backbone,
                    input_ids=self.on_device(inputs.ids),
                    attention_mask=self.on_device(prompt.long()),
                    position_ids=self.on_device((prompt.long().cumsum(1) - 1).clamp(min=0)),
                    cache=None,
                ),
            )
            owner = torch.zeros_like(inputs.ids).masked_fill(~prompt, -1)
        frontier.extend(inputs.ids, real, owner)
        stream.mask, stream.seeing, stream.attention = self.masked(frontier.mask(inputs.ids.shape[1]))
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


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of inputs are the same, or hold the same."""
    return one.keys() == other.keys() and all(
        value is other[key] or (isinstance(value, Tensor) and torch.equal(value, other[key]))
        for key, value in one.items()
    )


def real_tokens(inputs: Inputs, name: str) -> Tensor:
    """Which of the new tokens are no padding, (B, T) bool."""
    mask = inputs.mask.get("tokens") if isinstance(inputs.mask, dict) else inputs.mask
    if mask is None:
        return torch.ones_like(inputs.ids, dtype=torch.bool)
    batch, length = inputs.ids.shape
    if mask.ndim == 2 and (mask.shape[0] != batch or mask.shape[1] < length):
        raise DataError(
            f"attention_mask must be of shape ({batch}, {length} or more), as many rows as input_ids and no fewer "
            f"tokens, but got {tuple(mask.shape)}: pass that of these tokens."
        )
    if mask.ndim != 2:
        raise DataError(
            f"attention_mask must be of shape (batch, length) where the augmenting model {name!r} has tokens of its "
            f"own, but got {tuple(mask.shape)}: pass a padding mask."
        )
    return mask[:, -inputs.ids.shape[1] :].bool()


def check_one_text(inputs: Inputs, real: Tensor, name: str) -> None:
    """Raise where positions begin anew within a row: the streams of several texts in one row would mix.

    Raises:
        DataError: for packed rows.
    """
    positions = inputs.positions
    if positions is None or positions.shape[-1] < 2:
        return
    both = (real[:, 1:] & real[:, :-1]).to(positions.device)
    if bool((both & (positions[..., 1:] <= positions[..., :-1])).any()):
        raise DataError(
            f"Each row must hold one text where the augmenting model {name!r} does not share the anchor's token ids, "
            f"but got position_ids that begin anew within a row: switch packing off."
        )


def base_arguments(
    backbone: Backbone, *, input_ids: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Cache | None
) -> dict[str, Any]:
    """Arguments for one base model's call, without those that it does not know."""
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    if position_ids is not None and backbone.takes_positions:
        arguments["position_ids"] = position_ids
    if cache is not None and backbone.cache_argument is not None:
        arguments[backbone.cache_argument] = cache
    if backbone.takes_use_cache:
        arguments["use_cache"] = cache is not None
    return arguments


def positions_for(
    backbone: Backbone, position_ids: Tensor | None, input_ids: Tensor, attention_mask: Any
) -> Tensor | None:
    """The positions that one base model gets: the caller's, or counted over real tokens where the model needs that.

    A model that adds an embedding of the absolute position would count padding on the left, so that a padded row would
    differ from the same row alone. A model with relative positions counts by itself, exactly as it does alone.
    """
    if position_ids is not None or not backbone.absolute_positions:
        return position_ids
    return counted(input_ids, attention_mask)


def counted(input_ids: Tensor, attention_mask: Any) -> Tensor | None:
    """Positions (B, T) of the new tokens, counted over the real ones; None where no 2-D mask tells which those are."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.clamp(min=0)[:, -input_ids.shape[1] :]


def length_of(input_ids: Tensor, attention_mask: Any, cache: Cache | None) -> int:
    """Tokens up to the end of this call, as far as shapes tell; only the device knows what a static cache holds."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.shape[1]
    past = cache.get_seq_length() if cache is not None else 0
    return input_ids.shape[1] + (past if isinstance(past, int) else 0)


def mask_of(attention_mask: Any, prefix: str) -> Any:
    """One base model's part of the dictionary that ``create_masks_for_generate`` makes; other masks as they are."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    if prefix in attention_mask:
        return attention_mask[prefix]
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in attention_mask.items() if key.startswith(start)}
