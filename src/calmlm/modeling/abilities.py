"""What the models of a composition can do together: positions, ids, and whether a cache can carry their pasts."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from calmlm.bases.families import Backbone, text_config
from calmlm.state.cache import moves


@dataclass(frozen=True)
class Abilities:
    """What the models that are switched on can do together.

    Attributes:
        backbones: of these models, by name; the anchor's is ``""``.
        reads: what each augmenting model reads, one of ``calmlm.config.READS``.
        openings: how many tokens each augmenting model reads before a text.
    """

    backbones: dict[str, Backbone]
    reads: dict[str, str]
    openings: dict[str, int]

    @property
    def _advancing(self) -> list[tuple[str, Backbone]]:
        """The anchor, and the augmenting models that share its token ids and read every one of them."""
        shared = [name for name, reads in self.reads.items() if reads == "tokens"]
        return [(name, self.backbones[name]) for name in ("", *shared)]

    @property
    def max_positions(self) -> int | None:
        """How many positions all models that share the anchor's ids have learned; None where positions do not end."""
        found = [
            backbone.max_positions - self.openings.get(name, 0)
            for name, backbone in self._advancing
            if backbone.max_positions is not None
        ]
        return min(found, default=None)

    @property
    def shared_ids(self) -> int:
        """All models that share the anchor's token ids know those below."""
        return min(backbone.vocab_size for _, backbone in self._advancing)

    @property
    def turns_at(self) -> list[int]:
        """The lengths beyond which a model that shares the anchor's ids turns all positions of a text otherwise."""
        return sorted({backbone.turns_at for _, backbone in self._advancing if backbone.turns_at is not None})


def can_cache(backbone: Backbone, model: PreTrainedModel, reads: str, opened: bool) -> bool:
    """Whether one model can carry its past in a cache.

    Args:
        backbone: of the model.
        model: the anchor or an augmenting model.
        reads: what it reads; the anchor reads ``"tokens"``.
        opened: whether it reads something before each text, from which only keys and values let it go on.
    """
    if reads == "tokens":
        return backbone.cache_argument is not None and not (opened and not moves(text_config(model)))
    if reads != "text":
        return True  # it reads once
    # Of tokens of its own nobody could read again what turns otherwise later.
    return backbone.cache_argument is not None and backbone.turns_at is None and moves(text_config(model))
