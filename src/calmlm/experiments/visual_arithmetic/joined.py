"""The trained compositions of visual arithmetic, and how pictures reach them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import calmlm
from calmlm.connectors import CONNECTORS
from calmlm.experiments.fitting import collator, fit
from calmlm.experiments.flops import Meter
from calmlm.experiments.visual_arithmetic.digits import SIZE, Digits
from calmlm.experiments.visual_arithmetic.pretraining import encode
from calmlm.experiments.visual_arithmetic.world import DC_PHRASINGS, IMAGE, Example, World

__all__ = ["EYES", "VARIANTS", "Variant", "compose_bases", "composition_examples", "pictures_of", "train_composition"]

EYES = "eyes"


@dataclass(frozen=True)
class Variant:
    """One trained composition: what it shows, the stage of its encoder, its connector."""

    title: str
    encoder: str = "encoder"
    connector: str = "cross_attention"


VARIANTS = {
    "composed": Variant("cross-attentions into two layers"),
    "composed_random": Variant("as composed, with an untrained encoder", encoder="random"),
    "flamingo": Variant("as composed, with Flamingo's connector", connector="flamingo"),
    "legonn": Variant("as composed, with LegoNN's connector over the encoder's classes", connector="legonn"),
}


def pictures_of(
    digits: Digits, pictures: Sequence[Sequence[int]], ids: Tensor, image_token: int
) -> dict[str, dict[str, Tensor]]:
    """The ``augmenting_inputs`` of a batch: its pictures, and the column of the token at which each stands.

    Args:
        digits: the pictures.
        pictures: indices into them, for each row in the order of its image tokens.
        ids: (B, T) int64, padded on either side.
        image_token: the token that stands for a picture.

    Returns:
        ``{"eyes": {"pixel_values": (B * n, 1, 8, 8), "at": (B, n)}}``; n is the most that a row has, at least 1, and
        rows with fewer are filled with empty pictures that stand nowhere.
    """
    most = max(1, *(len(row) for row in pictures))
    pixels = torch.zeros(len(pictures), most, 1, SIZE, SIZE)
    at = torch.full((len(pictures), most), -1)
    for row, chosen in enumerate(pictures):
        if chosen:
            pixels[row, : len(chosen)] = digits.pixels[list(chosen)]
            at[row, : len(chosen)] = (ids[row] == image_token).nonzero()[:, 0].cpu()
    return {EYES: {"pixel_values": pixels.flatten(0, 1), "at": at}}


def composition_examples(world: World) -> list[Example]:
    """Draw D_C: a part of the pictures, and no pair of ``world.unseen_pairs``."""
    rng, stage = world.rng("composition"), world.preset.composition
    return [_example(world, rng) for _ in range(stage.steps * stage.batch_size)]


def _example(world: World, rng: random.Random) -> Example:
    preset, pictures, draw = world.preset, world.digits.composition, rng.random()
    if draw < preset.numeric_share:
        return world.numeric(rng)
    if draw < preset.numeric_share + preset.naming_share:
        return world.naming(rng, pictures)
    third = rng.random() < preset.third_share
    return world.arithmetic(rng, world.pairs, pictures, DC_PHRASINGS, preset.figure_share, third)


def compose_bases(
    world: World, anchor: LlamaForCausalLM, encoder: PreTrainedModel, connector: str
) -> calmlm.CalmForCausalLM:
    """Return an untrained composition with the preset's connections and connector options."""
    preset = world.preset
    set_seed(world.seed + 2)
    # A connector that works on the input of a layer takes the next layer's: the same place in the anchor.
    shift = int(CONNECTORS[connector].before_layer)
    return calmlm.compose(
        copy.deepcopy(anchor),
        {EYES: encoder},
        connections=[(i, j + shift) for i, j in preset.connections],
        num_heads=preset.heads,
        rotary=True,
        query_key_bias=preset.query_key_bias,
        null_key=True,
        connector=connector,
    )


def train_composition(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    anchor: LlamaForCausalLM,
    encoder: PreTrainedModel,
    variant: str,
    meter: Meter | None = None,
) -> tuple[calmlm.CalmForCausalLM, list[tuple[int, float]]]:
    """Compose ``anchor`` with ``encoder`` and train the composition on D_C; ``meter`` counts what it takes."""
    model = compose_bases(world, anchor, encoder, VARIANTS[variant].connector)
    rows = encode(composition_examples(world), tokenizer)
    collate = with_pictures(collator(tokenizer.pad_token_id), world.digits, tokenizer.convert_tokens_to_ids(IMAGE))
    stage = world.preset.composition
    return model, fit(model, rows, tokenizer.pad_token_id, stage, world.seed, collate, meter=meter)


def with_pictures(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]], digits: Digits, image_token: int
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator that adds the rows' pictures to what ``collate`` makes of their ids."""
    return partial(_collated, collate, digits, image_token)  # which can be sent to workers


def _collated(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    digits: Digits,
    image_token: int,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    batch = collate(rows)
    inputs = pictures_of(digits, [row["pictures"] for row in rows], batch["input_ids"], image_token)
    return {**batch, "augmenting_inputs": inputs}
