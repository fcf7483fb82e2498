"""A reader of its own inputs: a text, an image, a sound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calmlm.bases.structure import accepts_argument
from calmlm.connectors.cross_attention import eager_attention, rotary_angles
from calmlm.errors import DataError, ModelError, first_line
from calmlm.readers.common import Common
from calmlm.readers.inputs import Inputs, padded_since, real_tokens
from calmlm.readers.kept_states import Reading, reading
from calmlm.readers.packing import Texts
from calmlm.state.call import Stream
from calmlm.state.frontier import NOBODY, Frontier
from calmlm.state.past import Past

MASKS = ("attention_mask", "pixel_attention_mask", "padding_mask", "patch_attention_mask")
"""What encoders call the mask of their input."""

OTHER_MASKS = ("head_mask", "global_attention_mask", "visual_attention_mask", "entity_attention_mask", "observed_mask")
"""How masks end that say nothing of these states' padding, or, of a picture's, only beside a text's."""

OF_TEXT = ("ids", "mask", "bbox", "inputs_embeds")
"""How what encoders take of a text ends; what else they take beside it has states behind the text's."""


@dataclass
class EncoderReader(Common):
    """A text, image or sound encoder with inputs of its own.

    One item per row, visible from the first token on; or, with ``at``, several items per row, each visible from the
    token at which it stands; where these are none in any row, the encoder does not run.
    """

    def read(self, inputs: Inputs, past: Past) -> Stream:
        frontier = past.frontier
        stream = Stream(None, None, None, past.cross, eager_attention)
        owner = inputs.ids.new_zeros((inputs.ids.shape[0], 0))
        given = dict((inputs.augmenting or {}).get(self.name) or {})
        if frontier.width == 0 and frontier.length == 0:
            frontier.given = given
            if not self._is_empty(given, inputs.ids.shape[0]):
                owner = self._encode(stream, dict(given), inputs)
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
        padding = padded_since(inputs, frontier)
        if padding is not None:
            self._forget(padding, frontier)
        frontier.extend(inputs.ids, real, owner)
        visible = frontier.mask(inputs.ids.shape[1])
        if inputs.texts is not None:
            visible = visible & inputs.texts.same(owner)[:, None]
        stream.mask, stream.seeing, stream.attention = self.masked(visible)
        if self.connector.rotary and inputs.texts is not None:
            places = inputs.texts.place, inputs.texts.places(owner)
            stream.rotation, stream.key_rotation = (rotary_angles(p, self.connector.head_dim) for p in places)
        elif self.connector.rotary:
            stream.rotation, stream.key_rotation = frontier.rotations(
                inputs.ids.shape[1], owner.shape[1], self.connector.head_dim
            )
        return stream

    def _is_empty(self, given: dict[str, Any], rows: int) -> bool:
        """Whether ``at`` says that the call has no items."""
        at = given.get("at")
        if not isinstance(at, Tensor) or at.ndim != 2 or at.shape[1]:
            return False
        items = max(
            (len(value) for key, value in given.items() if key != "at" and isinstance(value, Tensor) and value.ndim),
            default=0,
        )
        self._check_items(at, items, rows)
        return True

    def _forget(self, columns: Tensor, frontier: Frontier) -> None:
        """Continue counting without the anchor tokens that turned out to be padding."""
        assert frontier.owner is not None
        if self.connector.rotary and bool((frontier.owner >= frontier.length).any()):
            raise DataError(
                f"attention_mask must keep the tokens that past_key_values hold while items of {self.name!r} stand "
                f"further on, but it calls some of them padding: begin a new cache."
            )
        frontier.forget(columns)

    def _encode(self, stream: Stream, given: dict[str, Any], inputs: Inputs) -> Tensor:
        """Run the encoder; returns the owners of its positions."""
        at = given.pop("at", None)
        if not given:
            raise DataError(
                f"The augmenting model {self.name!r} must be given inputs of its own, but got none: pass "
                f"augmenting_inputs={{{self.name!r}: {{...}}}} with what its encoder takes."
            )
        try:
            rows = partial(_readings, given) if stream.cache is None else None
            self.run(stream, rows=rows, **{key: self.on_device(value) for key, value in given.items()})
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise DataError(
                f"augmenting_inputs[{self.name!r}] must be what {type(self.model).__name__} takes, but with "
                f"{', '.join(given)} it failed ({first_line(error)}): see its forward method."
            ) from error
        size = self.backbone.size
        other = {} if self.first.reads_distribution else {k: h for k, h in stream.hidden.items() if h.shape[-1] != size}
        if other:
            layer, states = next(iter(other.items()))
            raise ModelError(
                f"The connected layers of {self.name!r} must have states of width {size}, but layer {layer} of "
                f"{type(self.model).__name__} has {states.shape[-1]}: name layers of that width "
                f"with augmenting_layers_path, or choose another encoder."
            )
        return self._spread(stream, given, at, inputs.ids, inputs.texts)

    def _spread(self, stream: Stream, given: dict[str, Any], at: Any, ids: Tensor, texts: Texts | None) -> Tensor:
        """Give each row its encoded items (several rows of a beam share them); returns what token each position is at.

        ``at`` is (rows, items) int64, the column of each item's token, -1 for an item that is not there; by default
        there is one item for each text, which stands at its first token.
        """
        states = next(iter(stream.hidden.values()))
        pooled = states.ndim == 2
        if pooled:  # one distribution for the whole item
            stream.hidden = {layer: hidden[:, None] for layer, hidden in stream.hidden.items()}
            states = states[:, None]
        mask = None if pooled else self._mask(given, states)
        if at is None and texts is not None:
            at, item = self._at_texts(texts, len(states))
            stream.hidden = {layer: hidden[item.to(hidden.device)] for layer, hidden in stream.hidden.items()}
            states, mask = next(iter(stream.hidden.values())), None if mask is None else mask[item.to(mask.device)]
        elif at is None:
            at = torch.zeros((states.shape[0], 1), dtype=torch.long)
        self._check_items(at, states.shape[0], ids.shape[0])
        at = at.to(ids.device)
        given_rows, items = at.shape
        times = ids.shape[0] // given_rows
        for layer, hidden in stream.hidden.items():
            stream.hidden[layer] = hidden.reshape(given_rows, -1, hidden.shape[-1]).repeat_interleave(times, 0)
        owner = at[:, :, None].expand(-1, -1, states.shape[1])
        if mask is not None:
            owner = owner.masked_fill(mask.to(ids.device).view(given_rows, items, -1) == 0, NOBODY)
        return owner.reshape(given_rows, -1).repeat_interleave(times, 0)

    def _mask(self, given: dict[str, Any], states: Tensor) -> Tensor | None:
        """Which of an encoder's states stand for its input, (items, S); None where nothing says that some do not."""
        masks = {name: value for name in MASKS if isinstance(value := given.get(name), Tensor)}
        fitting = {name: mask for name, value in masks.items() if (mask := _in_columns(value, states)) is not None}
        name = next(iter(fitting), None)
        self._check_masks(given, name, states.shape[1])
        found = [] if name is None else [fitting[name]]
        ids = given.get("input_ids")
        if not found and isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] < states.shape[1]:
            found = [torch.ones_like(ids)]
        if not found:
            return None
        mask, length = found[0], states.shape[1]
        if mask.shape[1] != length:
            # Of transformers' encoders of sound waves, private.
            shorten = getattr(self.model, "_get_feature_vector_attention_mask", None)
            squeeze = getattr(self.model.config, "squeeze_factor", 1)
            if shorten is not None and squeeze > 1:  # several of the frames that it counts are one state (SEW)
                frames = self.model._get_feat_extract_output_lengths(mask.sum(-1))  # type: ignore[operator]
                mask = torch.arange(length, device=mask.device) < (frames // squeeze)[:, None]
            elif shorten is not None and not self.first.reads_distribution and accepts_argument(shorten, "add_adapter"):
                mask = shorten(length, mask, add_adapter=False)  # connected layers lie before the adapter, the head not
            elif shorten is not None:
                mask = shorten(length, mask)
            elif mask.shape[1] % length == 0:  # one state for several frames
                mask = mask.reshape(len(mask), length, -1).amax(-1)
            elif mask.shape[1] < length:
                mask = _filled_up(mask, given, length)
        if mask.shape[1] != length and not bool(mask.all()):
            raise DataError(
                f"The mask in augmenting_inputs[{self.name!r}] must tell which of the {length} states of "
                f"{type(self.model).__name__} are padding, but has {mask.shape[1]} columns: give one item at a time, "
                f"without padding."
            )
        return mask if mask.shape[1] == length else None

    def _check_masks(self, given: dict[str, Any], read: str | None, length: int) -> None:
        """Raise where a mask other than ``read``, which tells of all states, calls something padding."""
        for name, mask in given.items():
            other = name == read or name.endswith(OTHER_MASKS) or name.startswith("decoder_")
            if other or not name.endswith("_mask") or not isinstance(mask, Tensor) or not mask.numel():
                continue
            if bool((mask == 0).any() & (mask != 0).any()):  # with nothing but 0 it means that nothing is padding
                raise DataError(
                    f"Padding in augmenting_inputs[{self.name!r}] must be told by one mask of which it is known which "
                    f"of the {length} states of {type(self.model).__name__} it hides, but {name} of shape "
                    f"{tuple(mask.shape)} hides some of its input: give one item at a time, without padding."
                )

    def _at_texts(self, texts: Texts, items: int) -> tuple[Tensor, Tensor]:
        """Where the texts of packed rows begin, (B, most), and the item of each, (B * most,)."""
        count = len(texts.row)
        if items != count:
            raise DataError(
                f"augmenting_inputs[{self.name!r}] must hold one item for each of the {count} texts that share rows, "
                f"or say with 'at' which tokens the items belong to, but got {items}: pass one each, or 'at'."
            )
        of_rows = torch.bincount(texts.row)
        place = torch.arange(count, device=of_rows.device) - (of_rows.cumsum(0) - of_rows)[texts.row]
        at = texts.start.new_full((len(of_rows), int(of_rows.max())), NOBODY)
        item = torch.zeros_like(at)
        at[texts.row, place], item[texts.row, place] = texts.start, torch.arange(count, device=at.device)
        return at, item.flatten()

    def _check_items(self, at: Any, items: int, rows: int) -> None:
        whole = isinstance(at, Tensor) and not at.is_floating_point() and at.dtype != torch.bool
        if not whole or at.ndim != 2 or at.numel() != items or bool((at < -1).any()):
            shape = tuple(at.shape) if isinstance(at, Tensor) else type(at).__name__
            raise DataError(
                f"augmenting_inputs[{self.name!r}]['at'] must hold a whole number for each of the {items} items, as a "
                f"tensor of shape (rows, items per row), but got {shape}: give the column of each item's token, or -1."
            )
        # Beams of a row share its items; in training there are none, and each row has its own.
        if at.shape[0] == 0 or rows % at.shape[0] or (self.first.training and rows != at.shape[0]):
            raise DataError(
                f"augmenting_inputs[{self.name!r}] must hold one item per row, or say with 'at' which tokens the items "
                f"belong to, but got {at.shape[0]} for {rows} rows: pass one each, or 'at'."
            )


def _in_columns(mask: Tensor, states: Tensor) -> Tensor | None:
    """A mask of an encoder's input as (items, columns); one of patches, (items, H, W), has one for each state."""
    if mask.ndim == 3 and len(mask) == len(states) and mask[0].numel() == states.shape[1]:
        return mask.flatten(1)
    return mask if mask.ndim == 2 else None


def _filled_up(mask: Tensor, given: dict[str, Any], length: int) -> Tensor:
    """A text's mask, (items, S'), with what the encoder itself puts behind the text, (items, length).

    That is no text where nothing else was given (Longformer reads whole windows), and else a picture (LayoutLMv3).
    """
    missing = length - mask.shape[1]
    if all(name.endswith(OF_TEXT) or not isinstance(value, Tensor) for name, value in given.items()):
        return nn.functional.pad(mask, (0, missing))
    behind = given.get("visual_attention_mask")
    if isinstance(behind, Tensor) and behind.shape == (len(mask), missing):
        return torch.cat((mask.bool(), behind.to(mask.device).bool()), 1)
    return nn.functional.pad(mask, (0, missing), value=1)


def without_items(inputs: Inputs, name: str, rows: Tensor) -> Inputs:
    """``inputs`` with no items for the encoder ``name`` where it is given nothing and speaks in none of ``rows``."""
    given = inputs.augmenting or {}
    if given.get(name) or bool(rows.any()):
        return inputs
    nothing = {"at": inputs.ids.new_zeros((inputs.ids.shape[0], 0))}
    return replace(inputs, augmenting={**given, name: nothing})


def _readings(given: dict[str, Any]) -> list[Reading]:
    """What the items of a call are known by: all that the encoder takes; nothing where items cannot be told apart."""
    tensors = {name: value for name, value in sorted(given.items()) if isinstance(value, Tensor) and value.ndim}
    counts = {len(value) for value in tensors.values()}
    if len(counts) != 1 or len(tensors) != len(given):
        return []
    return [
        reading(
            [
                part
                for name, value in tensors.items()
                for part in (f"{name} {value.dtype}".encode(), _bytes(value[item]))
            ],
            None,
            0,
        )
        for item in range(counts.pop())
    ]


def _bytes(value: Tensor) -> bytes:
    return (
        str(tuple(value.shape)).encode()
        + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    )


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sets of inputs are the same, or hold the same."""
    return one.keys() == other.keys() and all(
        value is other[key] or (isinstance(value, Tensor) and torch.equal(value, other[key]))
        for key, value in one.items()
    )
