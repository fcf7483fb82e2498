"""Tiny random language models, built offline: one row per architecture family, hidden sizes and depths all different.

    model = tiny_model("llama")                          # fp32, eval mode, eager attention, seeded
    model = tiny_model("gemma3_text", sliding_window=5)  # any config key can be overridden

Weights are larger than a fresh model's (and biases are not zero), so that a wrong mask or a swapped axis moves the
logits by far more than a test's tolerance.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 97
MAX_POSITIONS = 128

# Families that transformers runs with eager attention only.
EAGER_ONLY = frozenset({"bloom", "codegen", "gemma2", "gpt_neo", "gptj", "mpt", "xglm"})

# Mixtures of experts batch tokens by expert: other tokens reach the last bits (1e-6) of a token, nothing else of it.
MIXTURES = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})

# What is the same in every family; a family's own row wins.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": MAX_POSITIONS,
}


def _modern(hidden: int, depth: int, heads: int, kv_heads: int, inner: int, **extra: Any) -> dict[str, Any]:
    """The keys that Llama named and most later families kept. Experts want widths that are multiples of 4."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        **extra,
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _modern(48, 5, 6, 2, 71),
    "mistral": _modern(40, 4, 4, 2, 67, sliding_window=None, head_dim=10),
    "mixtral": _modern(36, 4, 6, 3, 44, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": _modern(56, 6, 4, 2, 73),
    "qwen2_moe": _modern(
        32,
        4,
        4,
        2,
        53,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
    ),
    "qwen3": _modern(42, 4, 6, 2, 59, head_dim=10),
    "qwen3_moe": _modern(44, 4, 4, 2, 61, head_dim=14, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
    "gemma": _modern(54, 4, 3, 1, 79, head_dim=14),
    "gemma2": _modern(60, 4, 6, 3, 83, head_dim=10, query_pre_attn_scalar=10, sliding_window=64),
    "gemma3_text": _modern(52, 6, 4, 2, 89, head_dim=12, query_pre_attn_scalar=12, sliding_window=64),
    "phi": _modern(64, 4, 4, 4, 101, partial_rotary_factor=0.5),
    "phi3": _modern(30, 5, 3, 3, 43),
    "gpt2": {"n_embd": 35, "n_layer": 5, "n_head": 5, "n_positions": MAX_POSITIONS},
    "gpt_neo": {
        "hidden_size": 28,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 64,
    },
    "gpt_neox": _modern(66, 5, 3, 3, 103, rotary_pct=0.5),
    "gptj": {"n_embd": 38, "n_layer": 4, "n_head": 2, "n_positions": MAX_POSITIONS, "rotary_dim": 6},
    "codegen": {"n_embd": 72, "n_layer": 4, "n_head": 4, "n_positions": MAX_POSITIONS, "rotary_dim": 6},
    "gpt_bigcode": {"n_embd": 45, "n_layer": 4, "n_head": 5, "n_positions": MAX_POSITIONS},
    "opt": {
        "hidden_size": 33,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "ffn_dim": 47,
        "word_embed_proj_dim": 33,
    },
    "bloom": {"hidden_size": 63, "n_layer": 5, "n_head": 7},
    "falcon": {
        "hidden_size": 50,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "new_decoder_architecture": False,
        "multi_query": True,
        "alibi": False,
    },
    "mpt": {"d_model": 55, "n_layers": 5, "n_heads": 5, "max_seq_len": MAX_POSITIONS, "expansion_ratio": 2},
    "stablelm": _modern(68, 4, 2, 2, 107, partial_rotary_factor=0.25, use_parallel_residual=False),
    "olmo": _modern(76, 4, 2, 1, 109),
    "olmo2": _modern(78, 5, 3, 3, 113),
    "olmoe": _modern(100, 4, 5, 5, 40, num_experts=4, num_experts_per_tok=2),
    "granite": _modern(80, 4, 4, 2, 127, embedding_multiplier=1.5, residual_multiplier=0.7, logits_scaling=1.3),
    "cohere": _modern(84, 4, 6, 3, 131, logit_scale=0.5),
    "cohere2": _modern(24, 4, 2, 1, 31, sliding_window=64, logit_scale=0.5),
    "starcoder2": _modern(90, 4, 9, 3, 137, sliding_window=None),
    "smollm3": _modern(96, 4, 4, 2, 139, no_rope_layer_interval=4),
    "helium": _modern(70, 5, 5, 1, 97, head_dim=14),
    "glm": _modern(88, 4, 4, 2, 149, head_dim=22, partial_rotary_factor=0.5),
    "glm4": _modern(26, 4, 1, 1, 39, head_dim=26, partial_rotary_factor=0.5),
    "nemotron": _modern(92, 4, 2, 1, 151, head_dim=46, partial_rotary_factor=0.5),
    "persimmon": _modern(104, 4, 2, 2, 157, partial_rotary_factor=0.5),
    "ernie4_5": _modern(62, 4, 1, 1, 163, head_dim=62),
    "seed_oss": _modern(46, 4, 1, 1, 167, head_dim=18),
    "biogpt": _modern(51, 4, 3, 3, 173),
    "xglm": {"d_model": 57, "num_layers": 4, "attention_heads": 3, "ffn_dim": 179},
}


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of one tiny model; `overrides` are its own config keys."""
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    attn_implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random causal LM in eval mode. The same `family`, `seed` and `overrides` give the same weights."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_tokens(batch: int = 2, length: int = 11, *, seed: int = 0) -> torch.Tensor:
    """(batch, length) int64 ids without the special ones (0, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)


CHAT_TEMPLATE = """{%- for message in messages -%}
<{{ message['role'] }}> {{ message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor -%}
{%- if add_generation_prompt %}<assistant> {% endif -%}"""


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """One token per character, 97 in all, with ids 0, 1 and 2 for padding, beginning and end as in the tiny models."""
    characters = [chr(code) for code in range(32, 127) if chr(code) not in "`|"] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    assert len(vocabulary) == VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="~",
        chat_template=chat_template,
        model_max_length=MAX_POSITIONS,
    )
