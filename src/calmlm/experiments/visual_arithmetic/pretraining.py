"""The base models: m_A recognises digits, m_B is general within its world. Both are trained from scratch."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from calmlm.experiments.fitting import IGNORED, fit
from calmlm.experiments.kv_arithmetic.pretraining import new_model
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.visual_arithmetic.digits import SIZE
from calmlm.experiments.visual_arithmetic.world import IMAGE, Example, World

__all__ = ["build_visual_tokenizer", "encode", "new_encoder", "train_anchor", "train_encoder"]

LARGEST_INTEGER = 27  # three digits sum to no more


def build_visual_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of key-value arithmetic, with one token that stands for a picture."""
    tokenizer = build_tokenizer(LARGEST_INTEGER)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return tokenizer


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Token ids, labels on the completion and the end of text, and the pictures."""
    prompts = tokenizer([e.prompt for e in examples]).input_ids
    completions = tokenizer([e.completion for e in examples], add_special_tokens=False).input_ids
    rows = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        target = [*completion, tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + target
        rows.append({"input_ids": prompt + target, "labels": labels, "pictures": example.pictures})
    return rows


def new_encoder(world: World, seed: int) -> ViTForImageClassification:
    """Return an untrained vision transformer with ten classes."""
    hidden, layers, heads = world.preset.encoder_size
    set_seed(seed)
    config = ViTConfig(
        initializer_range=0.1,  # the default 0.02 is too small for so narrow a model: it stays on a plateau
        image_size=SIZE,
        patch_size=world.preset.patch,
        num_channels=1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def train_encoder(world: World) -> tuple[ViTForImageClassification, list[tuple[int, float]]]:
    """Train m_A to say which digit a picture shows."""
    stage, digits, rng = world.preset.encoder, world.digits, world.rng("encoder")
    chosen = rng.choices(digits.training, k=stage.steps * stage.batch_size)
    rows = [{"pixel_values": _moved(digits.pixels[index], rng), "labels": digits.shown[index]} for index in chosen]
    model = new_encoder(world, world.seed)
    losses = fit(model, rows, 0, stage, world.seed, _stacked, Trainer)
    return model, losses


def _moved(pixels: Tensor, rng: random.Random) -> Tensor:
    """A picture (1, 8, 8) moved by up to one pixel."""
    return torch.roll(pixels, (rng.randint(-1, 1), rng.randint(-1, 1)), (1, 2))


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def train_anchor(world: World, tokenizer: PreTrainedTokenizerBase) -> tuple[LlamaForCausalLM, list[tuple[int, float]]]:
    """Train m_B on arithmetic in all phrasings and notations; it never sees what a picture shows."""
    stage, rng = world.preset.anchor, world.rng("anchor")
    examples = [world.general(rng) for _ in range(stage.steps * stage.batch_size)]
    model = new_model(tokenizer, world.preset.anchor_size, world.seed + 1)
    return model, fit(model, encode(examples, tokenizer), tokenizer.pad_token_id, stage, world.seed)
