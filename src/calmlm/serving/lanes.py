"""What runs a batch of texts: a composition, or a base model alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from calmlm.bases.families import Backbone, counted, text_config
from calmlm.bases.placement import execution_device
from calmlm.bases.structure import accepts
from calmlm.causal_lm import CalmForCausalLM
from calmlm.data.context import OwnContext, context_length, own_contexts, prompt_length, stated_length
from calmlm.decoding.limits import DraftLimits
from calmlm.errors import ConfigError
from calmlm.readers import base_arguments
from calmlm.state.cache import CalmCache
from calmlm.state.past import Announced
from calmlm.tokens.retokenization import Rewriting

Speaking = bool | tuple[bool, ...]
"""Whether the composition speaks in a text, or for each of its augmenting models whether that one does."""

UNEVEN = ("chunked_attention",)  # layers whose view of a text depends on the column in which it begins


class Lane:
    """A model that reads rows of tokens and says what may follow; all rows of a batch are read by one lane.

    Attributes:
        model: the composition or the base model.
        joins: whether texts of different lengths may be decoded together, as ``calmlm.serving.batching.try_out`` finds.
        pads: whether texts of different lengths may be read together.
        pieces: whether a text may be read in pieces.
        drafts: whether tokens may be read behind a text and taken back.
        chooses: whether rows may differ in who speaks in them.
    """

    model: Any
    joins = False
    pads = False
    pieces = False
    drafts = False
    chooses = False

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        raise NotImplementedError

    @property
    def caches(self) -> bool:
        """Whether the models carry their past in a cache."""
        raise NotImplementedError

    @property
    def turns_at(self) -> list[int]:
        """Lengths beyond which a text has to be read again from its beginning."""
        raise NotImplementedError

    @property
    def length(self) -> int | None:
        """Tokens of prompt and answer that the models take at most; None where none of them states it."""
        raise NotImplementedError

    @property
    def prompt_length(self) -> int | None:
        """Tokens that a prompt may have."""
        return self.length

    @property
    def contexts(self) -> list[OwnContext]:
        """The contexts of models that have tokens of their own."""
        return []

    @property
    def known_ids(self) -> int:
        """All models know the token ids below."""
        raise NotImplementedError

    def even(self) -> bool:
        """Whether nothing that the models do depends on how long the other rows are."""
        configs = [text_config(base) for base in self._bases()]
        turned = [str(getattr(config, "rope_parameters", None) or {}) for config in configs]
        kinds = [kind for config in configs for kind in getattr(config, "layer_types", None) or ()]
        return not self.turns_at and not any("'dynamic'" in one for one in turned) and not set(kinds) & set(UNEVEN)

    def shows(self, ids: Sequence[int]) -> str | None:
        """The augmenting model that would see nothing of a prompt, or None."""
        return None

    def read(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        composed: Tensor | None,
        given: Tensor | None,
        kept: int = 1,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, Cache | None]:
        """Read new tokens.

        Args:
            ids: (B, T) int64.
            mask: (B, past + T) int64, 1 at real tokens, padding on the left.
            cache: of the call before, or None at the beginning.
            composed: (B,) or (B, models) bool, who speaks in which row, or None for all in all.
            given: (B, length) bool, which tokens of a text were given, while it is read from its beginning; None later.
            kept: behind how many of the last tokens logits are wanted.
            whole: (B, n) int64, all tokens that were given, where they are read in pieces; there is no padding then.

        Returns:
            logits (B, ``kept``, vocabulary), and the cache.
        """
        raise NotImplementedError

    def readable(self, ids: Sequence[int], draft: Sequence[int], cache: Cache | None) -> int:
        """How many tokens of a draft behind a text the models know and have places for."""
        return len(draft)

    def _bases(self) -> list[PreTrainedModel]:
        raise NotImplementedError


class CompositionLane(Lane):
    """A composition.

    Args:
        model: the composition.
        name: what it is called.
        several: whether it stands for several that are served.

    Raises:
        ConfigError: where an augmenting model reads something other than text.
    """

    def __init__(self, model: CalmForCausalLM, name: str, *, several: bool = False) -> None:
        self.model, self.several = model, several
        entries = model.config.augmenting
        reading = {key: entry["reads"] for key, entry in entries.items()}
        encoders = [key for key, reads in reading.items() if reads == "inputs"]
        if encoders:
            raise ConfigError(
                f"A composition that is served must read text alone, but {encoders[0]!r} in {name!r} is an encoder "
                f"with inputs of its own: call it from Python."
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def caches(self) -> bool:
        return self.model.model.can_cache

    @property
    def turns_at(self) -> list[int]:
        return self.model.model.abilities.turns_at

    @property
    def length(self) -> int | None:
        return context_length(self.model)

    @property
    def prompt_length(self) -> int | None:
        return prompt_length(self.model)

    @property
    def contexts(self) -> list[OwnContext]:
        return own_contexts(self.model)

    @property
    def known_ids(self) -> int:
        return self.model.model.abilities.shared_ids

    def takes(self, ids: Sequence[int], room: int, known: int) -> bool:
        """Whether a text of another lane may stand in a batch, as a row in which no model speaks that is not its own.

        Args:
            ids: the prompt.
            room: how many tokens may be written behind it.
            known: the text's ids are below.
        """
        lengths = [(self.length, len(ids) + room), (self.prompt_length, len(ids))]
        if not (self.joins and self.chooses) or self.known_ids < known:
            return False
        if any(most is not None and most < own for most, own in lengths):
            return False
        # A model that is silent may read beyond what it knows, but not beyond the last of its positions.
        ending = [context for context in self.contexts if context.learned]
        return all(context.count(ids) + room * self._longest <= context.length for context in ending)

    @cached_property
    def _longest(self) -> int:
        """How many of its own tokens an augmenting model may read for one of the anchor's: as many as it has bytes."""
        sizes = [1]
        for found in self.model.model.alignments.values():
            rewritten = isinstance(found, Rewriting)
            sizes += [len(piece or ()) for piece in (found.pieces if rewritten else found.body)]  # type: ignore[union-attr]
        return max(sizes)

    def shows(self, ids: Sequence[int]) -> str | None:
        inner = self.model.model
        return next((name for name in inner.active if not inner.shows(name, ids)), None)

    def read(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        composed: Tensor | None,
        given: Tensor | None,
        kept: int = 1,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, Cache | None]:
        if whole is not None:
            cache = cache or self.model.model.new_cache()
            assert isinstance(cache, CalmCache)
            cache.announced = Announced(whole, torch.ones_like(whole, dtype=torch.bool), 0)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=counted(ids, mask),
            past_key_values=cache,
            use_cache=self.caches,
            logits_to_keep=kept,
            prompt_mask=given if self.model.model.wants_prompts else None,
            composition_mask=composed,
        )
        if whole is not None:
            output.past_key_values.announced = None
        return output.logits, output.past_key_values

    def readable(self, ids: Sequence[int], draft: Sequence[int], cache: Cache | None) -> int:
        assert isinstance(cache, CalmCache)
        limits = DraftLimits(self.model.model, cache, 0, sys.maxsize, [])
        return limits.readable(torch.tensor([[*ids, *draft]], device=self.device), len(ids))

    def _bases(self) -> list[PreTrainedModel]:
        return [*self.model.model.bases()]


class BaseLane(Lane):
    """A base model alone; the hooks of compositions around it do nothing then."""

    def __init__(self, model: PreTrainedModel, layers_path: str | None = None) -> None:
        self.model = model
        self.backbone = Backbone.of(model, "anchor", layers_path)
        self._keeps = accepts(model, "logits_to_keep")

    @property
    def device(self) -> torch.device:
        return execution_device(self.model.get_input_embeddings())

    @property
    def caches(self) -> bool:
        return self.backbone.cache_argument is not None

    @property
    def turns_at(self) -> list[int]:
        return [] if self.backbone.turns_at is None else [self.backbone.turns_at]

    @property
    def length(self) -> int | None:
        found = [stated_length(self.model.config), self.backbone.max_positions]
        return min((length for length in found if length is not None), default=None)

    @property
    def known_ids(self) -> int:
        return self.backbone.vocab_size

    def read(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: Cache | None,
        composed: Tensor | None,
        given: Tensor | None,
        kept: int = 1,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, Cache | None]:
        if cache is None and self.caches:
            cache = DynamicCache(config=text_config(self.model))
        arguments = base_arguments(
            self.backbone, input_ids=ids, attention_mask=mask, position_ids=counted(ids, mask), cache=cache
        )
        if self._keeps:
            arguments["logits_to_keep"] = self.backbone.kept(kept, ids)
        return self.model(**arguments).logits[:, -kept:], cache

    def _bases(self) -> list[PreTrainedModel]:
        return [self.model]
