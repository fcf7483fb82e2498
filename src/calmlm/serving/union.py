"""Several compositions around one anchor as a single one, whose rows each choose the augmenting models that speak.

It has the models, weights and connections of all of them and none of its own, so that it costs no memory beside them.
Each row costs what the anchor and all augmenting models cost: a step of one large batch in the place of a step for each
composition.
"""

from __future__ import annotations

from typing import Any

from calmlm.causal_lm import CalmForCausalLM
from calmlm.config import CalmConfig

__all__ = ["united"]


def united(compositions: dict[str, CalmForCausalLM]) -> tuple[CalmForCausalLM, dict[str, tuple[bool, ...]]]:
    """One composition of several around the same anchor, which stay as they are.

    Args:
        compositions: by name.

    Returns:
        the composition, and for each name the row of a ``composition_mask`` in which it alone speaks.
    """
    first = next(iter(compositions.values()))
    places = {
        f"{index}_{key}": (name, model, key)
        for index, (name, model) in enumerate(compositions.items())
        for key in model.augmenting
    }
    config = CalmConfig(
        text_config=first.config.text_config,
        anchor=first.config.anchor,
        augmenting={own: model.config.augmenting[key] for own, (_, model, key) in places.items()},
        order=list(places),
    )
    models = {own: model.augmenting[key] for own, (_, model, key) in places.items()}
    writers: Any = {
        own: model.model.transcoders[key] for own, (_, model, key) in places.items() if key in model.model.transcoders
    }
    whole = CalmForCausalLM(config, first.anchor, models, writers)
    for own, (_, model, key) in places.items():
        whole.model.connectors[own].load_state_dict(model.model.connectors[key].state_dict(), assign=True)
    rows = {name: tuple(owner == name for owner, _, _ in places.values()) for name in compositions}
    return whole.eval(), rows
