"""The base models: m_A memorises the dictionary, m_B is general within its world. All are trained from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

from calmlm.experiments.fitting import Stage, fit
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.tokenizer import (
    build_bpe_tokenizer,
    build_character_tokenizer,
    build_tokenizer,
)
from calmlm.experiments.kv_arithmetic.world import Example, World

__all__ = ["BASES", "TOKENIZERS", "augmenting_examples", "new_model", "train_anchor", "train_augmenting"]

Trained = tuple[LlamaForCausalLM, list[tuple[int, float]]]


def new_model(tokenizer: PreTrainedTokenizerBase, size: tuple[int, int, int], seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of (hidden size, layers, heads)."""
    hidden, layers, heads = size
    set_seed(seed)
    config = LlamaConfig(
        # The default 0.02 is too small for such narrow models: they stay on a plateau for hundreds of steps.
        initializer_range=0.06,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def augmenting_examples(world: World, keys: Sequence[str] | None = None) -> list[Example]:
    """What m_A is trained on: rows of keys and values, and KV-SUBS.

    With ``keys``, it learns these alone, and that other words have no value, which its states then tell.
    """
    preset = world.preset
    stage = preset.augmenting if keys is None else preset.halves
    rng = world.rng("augmenting")
    count = stage.steps * stage.batch_size
    examples = []
    for i in range(count):
        # Substituting is quick to learn once the keys are known, and slows that down before.
        share = preset.substitution_share if i > 0.4 * count else 0.0
        substitutes = rng.random() < share
        examples.append(world.substitution(rng, keys or world.keys) if substitutes else world.row(rng, keys))
    return examples


def train_augmenting(world: World, tokenizer: PreTrainedTokenizerBase, keys: Sequence[str] | None = None) -> Trained:
    """Train m_A, on all keys or on some."""
    preset = world.preset
    stage = preset.augmenting if keys is None else preset.halves
    model = new_model(tokenizer, preset.augmenting_size, world.seed)
    rows = encode(augmenting_examples(world, keys), tokenizer)
    return model, fit(model, rows, tokenizer.pad_token_id, stage, world.seed)


def train_characters(world: World, tokenizer: PreTrainedTokenizerBase) -> Trained:
    """Train an m_A whose tokens are single characters.

    It has to put words together first, and with all keys at once it stays at guessing for its whole training. So it
    begins with few keys, in the simplest rows, and their number doubles again and again.
    """
    preset = world.preset
    stage = preset.characters
    rng = world.rng("characters")
    count = stage.steps * stage.batch_size
    order = rng.sample(world.keys, len(world.keys))
    examples = []
    for i in range(count):
        done = i / count
        keys = order[: min(len(order), int(preset.first_keys * 2 ** (done / 0.06)))]
        if rng.random() < 1 - done / 0.3:
            examples.append(world.plain_row(rng, keys))
        elif rng.random() < (preset.substitution_share if done > 0.45 else 0.0):
            examples.append(world.substitution(rng, keys))
        else:
            examples.append(world.row(rng, drawn_from=keys, joined_share=preset.joined_share))
    model = new_model(tokenizer, preset.characters_size, world.seed)
    return model, fit(model, encode(examples, tokenizer, joint=" "), tokenizer.pad_token_id, stage, world.seed)


def train_anchor(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage | None = None,
    size: tuple[int, int, int] | None = None,
) -> Trained:
    """Train m_B on arithmetic in all phrasings and notations; it never sees a key with its value."""
    stage = stage or world.preset.anchor
    rng = world.rng("anchor")
    count = stage.steps * stage.batch_size
    examples = [world.general(rng, i / count) for i in range(count)]
    model = new_model(tokenizer, size or world.preset.anchor_size, world.seed + 1)
    return model, fit(model, encode(examples, tokenizer), tokenizer.pad_token_id, stage, world.seed)


def _bpe(world: World) -> PreTrainedTokenizerBase:
    """Byte pairs of texts with numbers in figures alone: with number words among them, each would become one token, and
    m_B would never learn to gather the value of a word from its pieces, as a key needs it."""
    plain = World(dataclasses.replace(world.preset, word_share=0.0), world.seed)
    rng = plain.rng("bpe")
    corpus = [f"{e.prompt} {e.completion}" for e in (plain.general(rng) for _ in range(20_000))]
    return build_bpe_tokenizer(corpus, world.preset.bpe_size)


TOKENIZERS: dict[str, Callable[[World], PreTrainedTokenizerBase]] = {
    "shared": lambda world: build_tokenizer(world.preset.largest_integer),
    "bpe": _bpe,
    "characters": lambda world: build_character_tokenizer(),
}

BASES: dict[str, tuple[str, Callable[[World, PreTrainedTokenizerBase], Trained]]] = {
    "augmenting": ("shared", train_augmenting),
    "anchor": ("shared", train_anchor),
    "augmenting_characters": ("characters", train_characters),
    "anchor_bpe": ("bpe", lambda world, t: train_anchor(world, t, world.preset.pieces)),
    "augmenting_first": ("shared", lambda world, t: train_augmenting(world, t, world.halves[0])),
    "augmenting_second": ("shared", lambda world, t: train_augmenting(world, t, world.halves[1])),
    # A model of m_A's size without its speciality, trained on m_B's kind of text for as long as m_A on its own.
    "vanilla": (
        "shared",
        lambda world, t: train_anchor(world, t, world.preset.augmenting, world.preset.augmenting_size),
    ),
    "random": ("shared", lambda world, t: (new_model(t, world.preset.augmenting_size, 1000 + world.seed), [])),
}
"""Each base model: its tokenizer and how it is trained."""
