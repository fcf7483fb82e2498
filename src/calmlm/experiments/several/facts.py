"""Facts that no model has read, and a small model that learns them on the spot."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from calmlm.data.padding import pad_id
from calmlm.experiments.fitting import Stage, fit
from calmlm.experiments.real.joined import rows_of
from calmlm.experiments.real.world import Item

__all__ = ["VARIETY", "Specialist", "facts", "taught"]

VARIETY = "facts"
"""What stands in an ``Item`` in the place of a language's variety."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Specialist:
    """The small model that knows the facts.

    Attributes:
        hidden: its width.
        layers: how many it has.
        training: of its weights, from random ones.
    """

    hidden: int = 256
    layers: int = 4
    training: Stage = field(default_factory=lambda: Stage(steps=500, batch_size=32, learning_rate=1e-3))


def facts(count: int, seed: int) -> list[Item]:
    """Telephone extensions of people who do not exist: a name of two words and a number of four digits.

    Each item's ``other`` prompt is that of another person.
    """
    chance = random.Random(f"facts-{seed}")
    names: dict[str, str] = {}
    while len(names) < count:
        name = " ".join(_word(chance, 2 + part) for part in range(2))
        names.setdefault(name, str(chance.randrange(1000, 10000)))
    prompts = [f"The extension of {name} is" for name in names]
    return [
        Item(prompt, number, VARIETY, index, prompts[index - 1])
        for index, (prompt, number) in enumerate(zip(prompts, names.values(), strict=True))
    ]


def _word(chance: random.Random, syllables: int) -> str:
    return "".join(chance.choice(CONSONANTS) + chance.choice(VOWELS) for _ in range(syllables)).capitalize()


def taught(known: list[Item], tokenizer: Any, vocabulary: int, preset: Specialist, seed: int) -> LlamaForCausalLM:
    """A Llama that has learned these facts and nothing else.

    Args:
        known: all facts.
        tokenizer: the anchor's, whose tokens it shares.
        vocabulary: how many ids the anchor has.
        preset: its size and training.
        seed: of its weights and of the order of facts.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=preset.hidden,
        intermediate_size=4 * preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=max(1, preset.hidden // 64),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    rows = rows_of(known, tokenizer)
    chance, order = random.Random(f"order-{seed}"), list[int]()
    while len(order) < preset.training.steps * preset.training.batch_size:
        order += chance.sample(range(len(rows)), len(rows))
    wanted = [dict(rows[index]) for index in order[: preset.training.steps * preset.training.batch_size]]
    fit(model, wanted, pad_id(tokenizer), preset.training, seed)
    return model.requires_grad_(False).eval()
