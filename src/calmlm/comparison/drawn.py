"""Experiments whose texts are drawn from a world, each of the two models reading its own kind of examples."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

from transformers import PreTrainedModel, set_seed

import calmlm
from calmlm.comparison.contract import TextDomain
from calmlm.comparison.methods import WITHOUT_PLAIN_TEXT
from calmlm.connectors import CONNECTORS
from calmlm.experiments.fitting import Row, Stage, fit
from calmlm.experiments.kv_arithmetic.pretraining import new_model
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.world import Example

__all__ = ["DrawnDomain", "DrawnWorld"]


class DrawnWorld(Protocol):
    """Draws examples."""

    def rng(self, purpose: str) -> random.Random:
        """A generator of its own for one purpose."""
        ...

    def specialist(self, rng: random.Random) -> Example:
        """What m_A is trained on."""
        ...

    def general(self, rng: random.Random) -> Example:
        """What m_B is trained on."""
        ...

    def composed(self, rng: random.Random) -> Example:
        """What the composition is trained on, D_C."""
        ...


class DrawnDomain(TextDomain):
    """Base models trained from nothing on examples of a world.

    Its preset has ``augmenting_size``, ``anchor_size``, the stages ``augmenting``, ``anchor`` and ``composition``,
    ``connections`` and ``heads``.
    """

    world: DrawnWorld
    methods = WITHOUT_PLAIN_TEXT

    def _draw(self, draw: Callable[[random.Random], Example], purpose: str, count: int) -> list[Row]:
        rng = self.world.rng(purpose)
        return encode([draw(rng) for _ in range(count)], self.tokenizer)

    def train(self, name: str) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
        preset = self.preset
        if name == "random":
            return new_model(self.tokenizer, preset.augmenting_size, 1000 + self.seed), []
        stage: Stage = preset.anchor if name == "anchor" else preset.augmenting
        size = preset.anchor_size if name == "anchor" else preset.augmenting_size
        draw = self.world.specialist if name == "augmenting" else self.world.general
        rows = self._draw(draw, name, stage.steps * stage.batch_size)
        model = new_model(self.tokenizer, size, self.seed + (name == "anchor"))
        return model, fit(model, rows, self.tokenizer.pad_token_id, stage, self.seed)

    def corpus(self) -> list[Row]:
        stage = self.preset.augmenting
        return self._draw(self.world.specialist, "augmenting", stage.steps * stage.batch_size)

    def composition(self, count: int, purpose: str, **changes: Any) -> list[Row]:
        return self._draw(self.world.composed, purpose, count)

    @cached_property
    def shown(self) -> set[str]:
        """The prompts of D_C: what m_B is to have kept is asked in others."""
        rng, stage = self.world.rng("composition"), self.stage
        return {self.world.composed(rng).prompt for _ in range(stage.steps * stage.batch_size)}

    def compose(self, augmenting: PreTrainedModel, connector: str = "cross_attention", **options: Any) -> Any:
        preset = self.preset
        set_seed(self.seed + 2)
        # A connector that works on the input of a layer takes the next layer's, where there is one: the same place.
        shift, last = int(CONNECTORS[connector].before_layer), preset.anchor_size[1] - 1
        usual: dict[str, Any] = {
            "connections": sorted({(i, min(j + shift, last)) for i, j in preset.connections}),
            "num_heads": preset.heads,
            "rotary": True,
            "query_key_bias": 1.5,
            "null_key": True,
        }
        return calmlm.compose(self.fresh_anchor(), augmenting, connector=connector, **{**usual, **options})
