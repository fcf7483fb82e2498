"""The trained compositions of the experiment: both readings of D_C, and the control with a random m_A."""

from __future__ import annotations

import copy
import random

from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import calmlm
from calmlm.experiments.kv_arithmetic.fit import encode, fit
from calmlm.experiments.kv_arithmetic.world import DC_PHRASINGS, Example, World

__all__ = ["VARIANTS", "compose_bases", "composition_examples", "train_composition"]

VARIANTS = {
    "composed": "D_C: arithmetic over held-in keys (paper, section 3.2), a tenth of it restated only",
    "composed_subs": "D_C: KV-SUBS over held-in keys (paper, section 4.1)",
    "composed_random": "as composed, with an untrained m_A",
}


def composition_examples(world: World, variant: str) -> list[Example]:
    """Draw D_C: only ``world.composition_keys`` occur. A fixed share of it is numeric and keeps what m_B can do."""
    preset = world.preset
    rng = world.rng("composition-subs" if variant == "composed_subs" else "composition")
    return [_example(world, rng, variant) for _ in range(preset.composition.steps * preset.composition.batch_size)]


def _example(world: World, rng: random.Random, variant: str) -> Example:
    draw = rng.random()
    if draw < 0.25 * world.preset.numeric_share:
        return world.numeric_restatement(rng)
    if draw < world.preset.numeric_share:
        return world.numeric(rng, DC_PHRASINGS, world.preset.composition_operands)
    keys, operands = world.composition_keys, world.preset.composition_operands
    if variant == "composed_subs" or rng.random() < world.preset.restated_share:
        return world.substitution(rng, keys, operands)
    return world.arithmetic(rng, keys, DC_PHRASINGS, operands, world.preset.figure_share)


def compose_bases(world: World, anchor: LlamaForCausalLM, augmenting: LlamaForCausalLM) -> PreTrainedModel:
    """Return an untrained composition with the preset's connections and connector options."""
    preset = world.preset
    set_seed(world.seed + 2)
    return calmlm.compose(
        copy.deepcopy(anchor),
        augmenting,
        connections=preset.connections,
        num_heads=preset.heads,
        norm=True,
        rotary=True,
        query_key_bias=preset.query_key_bias,
        null_key=True,
    )


def train_composition(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    anchor: LlamaForCausalLM,
    augmenting: LlamaForCausalLM,
    variant: str,
) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
    """Compose ``anchor`` with ``augmenting`` and train the composition on its D_C."""
    model = compose_bases(world, anchor, augmenting)
    rows = encode(composition_examples(world, variant), tokenizer)
    return model, fit(model, rows, tokenizer.pad_token_id, world.preset.composition, world.seed)
