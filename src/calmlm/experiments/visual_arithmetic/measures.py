"""What the table measures: the columns' items, the pipeline, and the share of items answered exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.experiments.fitting import answer
from calmlm.experiments.kv_arithmetic.world import final_answer
from calmlm.experiments.visual_arithmetic.joined import pictures_of
from calmlm.experiments.visual_arithmetic.world import (
    DC_PHRASINGS,
    HARD_PHRASINGS,
    IMAGE,
    OOD_PHRASINGS,
    Example,
    World,
)

__all__ = ["COLUMNS", "Answerer", "columns", "composition", "pipeline", "recognised", "score", "text_model"]

Answerer = Callable[[list[Example]], list[str]]
"""Completes the prompts of examples."""

COLUMNS = {
    "naming": "Naming a picture",
    "numeric": "Numeric arithmetic",
    "images": "Pictures, pairs of D_C",
    "images_pairs": "Pictures, unseen pairs",
    "ood": "Unseen pairs (OOD phrasings)",
    "ood_hard": "Unseen pairs and a third picture (OOD-hard)",
}
MAX_NEW_TOKENS = 14


def columns(world: World) -> dict[str, list[Example]]:
    """Draw the evaluation items, the same for every method; no picture in them was seen in any training."""
    pictures, unseen = world.digits.unseen, world.unseen_pairs
    draws: dict[str, Callable[..., Example]] = {
        "naming": lambda rng: world.naming(rng, pictures),
        "numeric": lambda rng: world.numeric(rng),
        "images": lambda rng: world.arithmetic(rng, world.pairs, pictures, DC_PHRASINGS),
        "images_pairs": lambda rng: world.arithmetic(rng, unseen, pictures, DC_PHRASINGS),
        "ood": lambda rng: world.arithmetic(rng, unseen, pictures, OOD_PHRASINGS),
        "ood_hard": lambda rng: world.arithmetic(rng, unseen, pictures, HARD_PHRASINGS, third=True),
    }
    items = {}
    for column, draw in draws.items():
        rng = world.rng(f"evaluation-{column}")
        items[column] = [draw(rng) for _ in range(world.preset.items)]
    return items


@torch.no_grad()
def recognised(encoder: PreTrainedModel, world: World, pictures: list[int]) -> list[int]:
    """Which digits m_A sees in the pictures."""
    where = next(encoder.parameters()).device
    return encoder(pixel_values=world.digits.pixels[pictures].to(where)).logits.argmax(-1).tolist()


def text_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int | None = None) -> Answerer:
    """A model that reads the text and sees no pictures; with ``tokens``, it writes exactly so many."""
    forced = {} if tokens is None else {"min_new_tokens": tokens}

    def run(examples: list[Example]) -> list[str]:
        prompts = [example.prompt for example in examples]
        return answer(model, tokenizer, prompts, tokens or MAX_NEW_TOKENS, extra=lambda start, ids: dict(forced))

    return run


def composition(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, tokens: int | None = None
) -> Answerer:
    """A composition with the pictures of each batch; with ``tokens``, it writes exactly so many."""
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    forced = {} if tokens is None else {"min_new_tokens": tokens}

    def run(examples: list[Example]) -> list[str]:
        def extra(start: int, ids: Tensor) -> dict[str, object]:
            chosen = [example.pictures for example in examples[start : start + len(ids)]]
            return {"augmenting_inputs": pictures_of(world.digits, chosen, ids, image_token), **forced}

        prompts = [example.prompt for example in examples]
        return answer(model, tokenizer, prompts, tokens or MAX_NEW_TOKENS, extra=extra)

    return run


def pipeline(encoder: PreTrainedModel, anchor: Answerer, world: World) -> Answerer:
    """m_A says what each picture shows, the figures are pasted in place of the pictures, m_B answers the new prompt."""

    def run(examples: list[Example]) -> list[str]:
        pasted = []
        for example in examples:
            prompt = example.prompt
            for digit in recognised(encoder, world, list(example.pictures)) if example.pictures else []:
                prompt = prompt.replace(IMAGE, str(digit), 1)
            pasted.append(Example(prompt, example.completion))
        return anchor(pasted)

    return run


def score(method: Answerer, items: dict[str, list[Example]]) -> dict[str, float]:
    """Return the share of items whose final answer is right, in per cent, by column."""
    shares = {}
    for column, examples in items.items():
        given = [final_answer(text) for text in method(examples)]
        right = sum(a == final_answer(e.completion) for a, e in zip(given, examples, strict=True))
        shares[column] = 100.0 * right / len(examples)
    return shares
