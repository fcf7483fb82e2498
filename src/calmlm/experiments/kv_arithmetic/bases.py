"""The two base models: m_A memorises the dictionary, m_B is general within its world. Both are trained from scratch."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

from calmlm.experiments.kv_arithmetic.fit import encode, fit
from calmlm.experiments.kv_arithmetic.world import World

__all__ = ["new_model", "train_anchor", "train_augmenting"]


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


def train_augmenting(world: World, tokenizer: PreTrainedTokenizerBase) -> tuple[LlamaForCausalLM, list]:
    """Train m_A on rows of keys and values and on KV-SUBS over all keys."""
    stage = world.preset.augmenting
    rng = world.rng("augmenting")
    count = stage.steps * stage.batch_size
    examples = []
    for i in range(count):
        # Substituting is quick to learn once the keys are known, and slows that down before.
        share = world.preset.substitution_share if i > 0.4 * count else 0.0
        examples.append(world.substitution(rng, world.keys) if rng.random() < share else world.row(rng))
    model = new_model(tokenizer, world.preset.augmenting_size, world.seed)
    return model, fit(model, encode(examples, tokenizer), tokenizer.pad_token_id, stage, world.seed)


def train_anchor(world: World, tokenizer: PreTrainedTokenizerBase) -> tuple[LlamaForCausalLM, list]:
    """Train m_B on arithmetic in all phrasings and notations; it never sees a key with its value."""
    stage = world.preset.anchor
    rng = world.rng("anchor")
    count = stage.steps * stage.batch_size
    examples = [world.general(rng, i / count) for i in range(count)]
    model = new_model(tokenizer, world.preset.anchor_size, world.seed + 1)
    return model, fit(model, encode(examples, tokenizer), tokenizer.pad_token_id, stage, world.seed)
