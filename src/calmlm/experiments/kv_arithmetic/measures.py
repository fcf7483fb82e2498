"""What the table measures: the columns' items, the cascade, and the share of items answered exactly."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.experiments.fitting import answer
from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS
from calmlm.experiments.kv_arithmetic.world import (
    DC_PHRASINGS,
    HARD_PHRASINGS,
    OOD_PHRASINGS,
    Example,
    World,
    final_answer,
)

__all__ = ["COLUMNS", "Answerer", "cascade", "columns", "half_columns", "models", "score"]

Answerer = Callable[[Sequence[str]], list[str]]
"""Completes prompts."""

COLUMNS = {
    "key_value": "Key-Value",
    "numeric": "Numeric arithmetic",
    "keys_arithmetic": "Keys arithmetic",
    "ood": "Keys arithmetic (OOD)",
    "ood_hard": "Keys arithmetic (OOD-hard)",
    "keys_arithmetic_seen": "Keys arithmetic, keys of D_C",
}

_WORD = re.compile(r"(?<![A-Za-z])[a-z]{2,6}(?![A-Za-z])")


def columns(world: World) -> dict[str, list[Example]]:
    """Draw the evaluation items, the same for every method; only the last column has keys that D_C uses."""
    preset = world.preset
    unseen, count = world.unseen_keys, preset.items
    longer = (preset.operands[1] + 1, preset.operands[1] + 1)
    draws: dict[str, Callable[..., Example]] = {
        "key_value": lambda rng: world.substitution(rng, unseen),
        "numeric": lambda rng: world.numeric(rng, DC_PHRASINGS),
        "keys_arithmetic": lambda rng: world.arithmetic(rng, unseen, DC_PHRASINGS),
        "ood": lambda rng: world.arithmetic(rng, unseen, OOD_PHRASINGS),
        "ood_hard": lambda rng: world.arithmetic(rng, unseen, HARD_PHRASINGS, longer),
        "keys_arithmetic_seen": lambda rng: world.arithmetic(rng, world.composition_keys, DC_PHRASINGS),
    }
    items = {}
    for column, draw in draws.items():
        rng = world.rng(f"evaluation-{column}")
        items[column] = [draw(rng) for _ in range(count)]
    return items


def half_columns(world: World) -> dict[str, list[Example]]:
    """Draw keys arithmetic over unseen keys of the first half of the keys, of the second, and of both together."""
    first, second = (world.half(index)[1] for index in (0, 1))
    items = {}
    for column, keys in (("first", first), ("second", second), ("both", [*first, *second])):
        rng = world.rng(f"evaluation-half-{column}")
        items[column] = [world.arithmetic(rng, keys, DC_PHRASINGS) for _ in range(world.preset.items)]
    return items


def models(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Answerer:
    """Return a function that completes prompts with a model."""
    return lambda prompts: answer(model, tokenizer, prompts, max_new_tokens)


def cascade(look_up: Answerer, calculate: Answerer) -> Answerer:
    """m_A looks every unknown word up, its answers are pasted in place of the words, m_B answers the new prompt."""

    def run(prompts: Sequence[str]) -> list[str]:
        found = {word for prompt in prompts for word in _WORD.findall(prompt)} - set(PHRASE_WORDS)
        words = sorted(found)
        first = [(text.split() or [""])[0] for text in look_up(words)]
        values = dict(zip(words, first, strict=True))
        return calculate([_WORD.sub(lambda match: values.get(match[0], match[0]), prompt) for prompt in prompts])

    return run


def is_right(column: str, completion: str, example: Example) -> bool:
    """Key-Value asks for the exact restatement, the other columns for the final answer."""
    if column == "key_value":
        return completion == example.completion
    return final_answer(completion) == final_answer(example.completion)


def score(method: Answerer, items: dict[str, list[Example]]) -> dict[str, float]:
    """Return the share of items answered rightly, in per cent, by column."""
    shares = {}
    for column, examples in items.items():
        completions = method([example.prompt for example in examples])
        right = sum(is_right(column, c, e) for c, e in zip(completions, examples, strict=True))
        shares[column] = 100.0 * right / len(examples)
    return shares
