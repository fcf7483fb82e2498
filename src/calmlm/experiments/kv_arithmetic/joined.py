"""The trained compositions of the experiment: readings of D_C, controls, connectors, tokenizers, halves of the keys."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import calmlm
from calmlm.connectors import CONNECTORS
from calmlm.experiments.fitting import Stage, answer, fit
from calmlm.experiments.kv_arithmetic.pretraining import BASES
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.world import DC_PHRASINGS, Example, World

__all__ = ["CORE", "GROUPS", "VARIANTS", "Variant", "compose_bases", "composition_examples", "train_composition"]

UNANSWERABLE = 4000  # different questions about words that nobody knows
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Variant:
    """One trained composition.

    Attributes:
        title: what it shows.
        augmenting, anchor: names of its base models.
        substitutes: whether D_C is KV-SUBS instead of keys arithmetic.
        connector: its connector.
        half: which half of the keys D_C is about; None for all.
        heads: of its connections, instead of the preset's.
    """

    title: str
    augmenting: str = "augmenting"
    anchor: str = "anchor"
    substitutes: bool = False
    connector: str = "cross_attention"
    half: int | None = None
    heads: int | None = None


VARIANTS = {
    "composed": Variant("D_C: arithmetic over held-in keys (paper, section 3.2), a tenth of it restated only"),
    "composed_subs": Variant("D_C: KV-SUBS over held-in keys (paper, section 4.1)", substitutes=True),
    "composed_random": Variant("as composed, with an untrained m_A", augmenting="random"),
    "flamingo": Variant("as composed, with Flamingo's connector", connector="flamingo"),
    "legonn": Variant("as composed, with LegoNN's connector", connector="legonn"),
    "two_tokenizers": Variant(
        "as composed, of a character-level m_A and an m_B of byte pairs",
        augmenting="augmenting_characters",
        anchor="anchor_bpe",
        heads=16,
    ),
    "first_half": Variant("an m_A that knows the first half of the keys", augmenting="augmenting_first", half=0),
    "second_half": Variant("an m_A that knows the second half of the keys", augmenting="augmenting_second", half=1),
}

CORE = ("composed", "composed_subs", "composed_random")
GROUPS = {
    "connectors": ("flamingo", "legonn"),
    "tokenizers": ("two_tokenizers",),
    "halves": ("first_half", "second_half"),
}


def composition_examples(
    world: World, variant: str, count: int | None = None, purpose: str = "composition"
) -> list[Example]:
    """Draw D_C: only ``world.composition_keys`` occur. A fixed share of it is numeric and keeps what m_B can do.

    Args:
        world: keys and values.
        variant: one of VARIANTS.
        count: how many examples, instead of as many as the variant's training takes.
        purpose: another one draws other examples of the same kind.
    """
    chosen = VARIANTS[variant]
    stage = stage_of(world, chosen)
    rng = world.rng(f"{purpose}-subs" if chosen.substitutes else purpose)
    return [_example(world, rng, chosen) for _ in range(count or stage.steps * stage.batch_size)]


def stage_of(world: World, variant: Variant) -> Stage:
    """How a composition is trained."""
    together = BASES[variant.augmenting][0] == BASES[variant.anchor][0]
    return world.preset.composition if together else world.preset.apart


def _example(world: World, rng: random.Random, variant: Variant) -> Example:
    draw = rng.random()
    if draw < 0.25 * world.preset.numeric_share:
        return world.numeric_restatement(rng)
    if draw < world.preset.numeric_share:
        return world.numeric(rng, DC_PHRASINGS, world.preset.composition_operands)
    keys, operands = world.composition_keys, world.preset.composition_operands
    if variant.half is not None:
        # Words that another model knows: this one has to be silent about them, or it could not be joined by others.
        keys = world.half(variant.half)[0]
        share = world.preset.foreign_share
        return world.arithmetic(rng, keys, DC_PHRASINGS, operands, world.preset.figure_share, share)
    if variant.substitutes or rng.random() < world.preset.restated_share:
        return world.substitution(rng, keys, operands)
    return world.arithmetic(rng, keys, DC_PHRASINGS, operands, world.preset.figure_share)


def compose_bases(
    world: World,
    anchor: LlamaForCausalLM,
    augmenting: LlamaForCausalLM,
    connector: str = "cross_attention",
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return an untrained composition with the preset's connections and connector options.

    Args:
        world: for its preset and seed.
        anchor, augmenting: the base models; the anchor is copied.
        connector: one of calmlm's connectors.
        tokenizers: the anchor's and the augmenting model's, where they differ.
        options: of `calmlm.compose`, instead of the preset's.
    """
    preset = world.preset
    set_seed(world.seed + 2)
    ours, theirs = tokenizers or (None, None)
    # A connector that works on the input of a layer takes the next layer's: the same place in the anchor.
    shift = int(CONNECTORS[connector].before_layer)
    usual: dict[str, Any] = {
        "connections": [(i, j + shift) for i, j in preset.connections],
        "num_heads": preset.heads,
        "norm": True,
        "rotary": True,
        "query_key_bias": preset.query_key_bias,
        "null_key": True,
        # Byte pairs and single characters: the stream is the same with "own", token by token.
        "alignment": "transcode",
    }
    return calmlm.compose(
        copy.deepcopy(anchor),
        augmenting,
        connector=connector,
        tokenizer=ours,
        augmenting_tokenizer=theirs,
        **{**usual, **options},
    )


def train_composition(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    anchor: LlamaForCausalLM,
    augmenting: LlamaForCausalLM,
    variant: str,
    augmenting_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
    """Compose ``anchor`` with ``augmenting`` and train the composition on its D_C."""
    pair = None if augmenting_tokenizer is None else (tokenizer, augmenting_tokenizer)
    heads = VARIANTS[variant].heads
    options = {} if heads is None else {"num_heads": heads}
    model = compose_bases(world, anchor, augmenting, VARIANTS[variant].connector, pair, **options)
    examples = composition_examples(world, variant)
    if VARIANTS[variant].half is not None:
        examples = _with_own_answers(world, tokenizer, anchor, examples)
    rows = encode(examples, tokenizer)
    return model, fit(model, rows, tokenizer.pad_token_id, stage_of(world, VARIANTS[variant]), world.seed)


def _with_own_answers(
    world: World, tokenizer: PreTrainedTokenizerBase, anchor: LlamaForCausalLM, examples: list[Example]
) -> list[Example]:
    """Put questions about words that nobody knows in place of some examples, with what m_B alone answers.

    So the composition learns to be silent where its m_A knows nothing: others may know, and are joined later.
    """
    rng = world.rng("unanswerable")
    prompts = [world.unanswerable(rng) for _ in range(min(UNANSWERABLE, len(examples)))]
    own = [Example(p, a) for p, a in zip(prompts, answer(anchor, tokenizer, prompts, ANSWER_TOKENS), strict=True) if a]
    share = world.preset.unanswerable_share if own else 0.0
    return [rng.choice(own) if rng.random() < share else example for example in examples]
