"""What an augmenting model reads before the text: its tokenizer's beginning, and a prefix that it alone is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.placement import execution_device
from calmlm.bases.trees import has_window, padded_mask, takes_trees
from calmlm.errors import ConfigError, DataError
from calmlm.state.cache import length_in, moves, text_cache
from calmlm.state.past import Past


class Opening:
    """Tokens that a model reads once; every text goes on from there.

    Their keys and values stand at the beginning of the model's own cache. The anchor does not look at them. A model
    that keeps its past in another form, such as a state, reads them with each text, right before it.

    Args:
        ids: of the tokens.
        model: the augmenting model.
        backbone: its decoder.
    """

    def __init__(self, ids: Sequence[int], model: nn.Module, backbone: Backbone) -> None:
        self.ids, self.model, self.backbone = tuple(ids), model, backbone
        self._read: tuple[Any, list[tuple[Tensor, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def comes_with_text(self) -> bool:
        """Whether there is an opening, and the model has no keys and values by which to go on from it."""
        return bool(self.ids) and not self._keeps_columns

    @cached_property
    def _keeps_columns(self) -> bool:
        """Whether the model carries its past as keys and values alone, column by column; found out once."""
        return self.backbone.cache_argument is not None and moves(text_config(self.model))  # type: ignore[arg-type]

    def change(self, ids: Sequence[int]) -> None:
        """Read other tokens from the next text on."""
        self.ids, self._read = tuple(ids), None

    def begin(self, past: Past, rows: int) -> Past:
        """``past`` with the opening in it, for a call on so many rows.

        A call without a cache gets one of its own.
        """
        if not self.ids:
            return past
        if self.comes_with_text:
            return dataclasses.replace(past, opening=len(self.ids))
        config = text_config(self.model)  # type: ignore[arg-type]
        own = past.own if past.own is not None else text_cache(DynamicCache(config=config), config)
        self.fill(own, rows)
        return dataclasses.replace(past, own=own, opening=len(self.ids))

    def fill(self, cache: Cache, rows: int) -> None:
        """Put the opening into an empty cache of the model; one that holds something holds it already."""
        # A compiled step only ever goes on; its cache has been begun by the step before.
        if torch.compiler.is_compiling() or int(length_in(cache) or 0):
            return
        for layer, (keys, values) in zip(cache.layers, self._states(), strict=True):
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))

    def mask(self, mask: Any) -> Any:
        """A padding mask (B, S) of the text with the opening before it; other masks as they are."""
        if not self.ids or not isinstance(mask, Tensor) or mask.ndim != 2:
            return mask
        return nn.functional.pad(mask, (len(self.ids), 0), value=1)

    def attention(self, mask: Any, new: int, length: int | None = None) -> Any:
        """What the model is given for a mask of the text, (B, past + new), with the opening before it.

        Padding may stand between the two. To a model that looks back over a window of columns, what stands before it
        would be further away.

        Args:
            mask: of the text; others as they are.
            new: columns of this call.
            length: of a static cache.

        Raises:
            DataError: for a model that would count such padding.
        """
        if self.comes_with_text:  # see ``with_text``
            return mask
        longer = self.mask(mask)
        if not self.ids or not isinstance(longer, Tensor) or longer.ndim != 2:
            return longer
        config = text_config(self.model)  # type: ignore[arg-type]
        if not has_window(config) or not takes_trees(config):
            self.backbone.check_gaps("augmenting model", longer)
            return longer
        return padded_mask(config, longer, new, self.backbone.dtype, length)

    def positions(self, positions: Tensor | None) -> Tensor | None:
        """Positions of the text behind the opening."""
        return positions if positions is None or not self.ids else positions + len(self.ids)

    def with_text(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """A call of the model, with the opening right before each text where it has to come with it.

        Args:
            arguments: of the model, for whole texts.

        Returns:
            the arguments, and how many columns more they have.

        Raises:
            DataError: for a mask that does not say where a text begins.
        """
        if not self.comes_with_text:
            return arguments, 0
        ids, mask, count = arguments["input_ids"], arguments.get("attention_mask"), len(self.ids)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise DataError(
                f"The attention_mask must be of shape (batch, length), because {type(self.backbone.decoder).__name__} "
                f"reads a beginning or prefix right before each text, but got another: pass such a mask, or none."
            )
        mask = mask if mask is None else mask.to(ids.device)
        begin = ids.new_zeros((len(ids), 1)) if mask is None else mask.bool().long().argmax(1, keepdim=True)
        where = begin + torch.arange(count, device=ids.device)
        read = ids.new_tensor(self.ids).expand(len(ids), -1)
        longer = {"input_ids": nn.functional.pad(ids, (count, 0)).scatter(1, where, read)}
        if mask is not None:
            longer["attention_mask"] = nn.functional.pad(mask, (count, 0)).scatter(1, where, mask.new_ones(where.shape))
        if "position_ids" in arguments:
            real = longer.get("attention_mask", torch.ones_like(longer["input_ids"]))
            longer["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0) + self.backbone.first_position
        return arguments | longer, count

    def _states(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the opening in each layer, (1, heads, length, width); read once on each device."""
        device = execution_device(self.backbone.decoder)
        where = (device, *_marks(self.backbone.decoder))
        if self._read is None or self._read[0] != where:
            config = text_config(self.model)  # type: ignore[arg-type]
            cache: Cache = text_cache(DynamicCache(config=config), config)
            ids = torch.tensor([self.ids], device=device)
            given: dict[str, Any] = {self.backbone.cache_argument or "past_key_values": cache}
            if self.backbone.takes_use_cache:
                given["use_cache"] = True
            if self.backbone.given_positions and self.backbone.takes_positions:
                given["position_ids"] = torch.arange(len(self.ids), device=device)[None] + self.backbone.first_position
            with torch.no_grad():
                self.backbone.decoder(input_ids=ids, **given)
            self._read = where, [(layer.keys, layer.values) for layer in cache.layers]
        return self._read[1]


def check_opening(name: str, backbone: Backbone, beginning: Sequence[int], prefix: Sequence[int]) -> None:
    """Raise unless a model has tokens and positions for what it is to read before each text.

    Raises:
        ConfigError: otherwise.
    """
    if max(prefix, default=-1) >= backbone.vocab_size:
        raise ConfigError(
            f"augmenting_prefix must be of tokens below {backbone.vocab_size}, the vocabulary of {name}, but got "
            f"{max(prefix)}: pass its own tokenizer."
        )
    count, most = len(beginning) + len(prefix), backbone.max_positions
    if most is not None and count >= most:
        raise ConfigError(
            f"augmenting_prefix must leave room for text in the {most} positions of {name}, but with its beginning it "
            f"has {count} tokens: shorten it."
        )


def _marks(decoder: nn.Module) -> Iterator[Any]:
    """What changes with a model's weights, without a look at them, and with the dtype it is asked to compute in."""
    yield torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    for parameter in decoder.parameters():
        place = parameter.data_ptr() if type(parameter.data) is Tensor else id(parameter)
        yield place, parameter.dtype, 0 if parameter.is_inference() else parameter._version
