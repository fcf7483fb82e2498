"""Tiny compositions with words of each kind: over families and pairs of tokenizers."""

from __future__ import annotations

from typing import Any

import torch

import calmlm
from calmlm.connectors.gate import OPENING
from calmlm.connectors.word_map import WordMap
from compositions import own, tiny_composition

KINDS = ("map", "pointer")


COMPOSITIONS: dict[str, dict[str, Any]] = {
    "llama+mistral": {"anchor": "llama", "augmenting": "mistral"},
    "gpt2+qwen3, words alone": {"anchor": "gpt2", "augmenting": "qwen3", "connections": "none"},
    "gemma3+opt, words alone": {"anchor": "gemma3_text", "augmenting": "opt", "connections": "none"},
    "phi+gpt_neox": {"anchor": "phi", "augmenting": "gpt_neox"},  # an anchor with biases in its head
    "mistral+gemma3, own tokens": {"anchor": "mistral", "augmenting": "gemma3_text", **own("bytes-large")},
    "llama+gpt2, own tokens, words alone": {
        "anchor": "llama", "augmenting": "gpt2", "connections": "none", **own("bytes"),
    },
    "qwen2+llama, own tokens": {"anchor": "qwen2", "augmenting": "llama", **own("sentencepiece")},
    "opt+phi3, transcoded, words alone": {
        "anchor": "opt", "augmenting": "phi3", "connections": "none", **own("unigram"), "alignment": "transcode",
    },
    "gemma2+mistral, merges in both, words alone": {
        "anchor": "gemma2", "augmenting": "mistral", "connections": "none", **own("bytes-large", "sentencepiece"),
    },
}  # fmt: skip


def speaking(kind: str, name: str, *, awake: bool = True) -> calmlm.CalmForCausalLM:
    """A composition with words of this kind, its gates open."""
    model = tiny_composition(awake=awake, words=kind, **COMPOSITIONS[name])
    words = model.model.connectors["augmenting"][-1]
    if awake and isinstance(words, WordMap):
        fit = tiny_composition(awake=False, words="map", **COMPOSITIONS[name]).model.connectors["augmenting"][-1].map
        words.map.load_state_dict(fit.state_dict())
        with torch.no_grad():
            words.scale_anchor.fill_(1.3)
            words.scale_augmenting.fill_(0.8)
    if awake:
        with torch.no_grad():
            words.opening.fill_(0.7 / OPENING)
            for part in (words.gate_anchor, words.gate_augmenting):  # so that both models are heard everywhere
                part.mul_(0.1)
    return model
