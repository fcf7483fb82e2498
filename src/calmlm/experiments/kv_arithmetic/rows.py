"""Examples as token ids and labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from calmlm.experiments.fitting import IGNORED
from calmlm.experiments.kv_arithmetic.world import Example

__all__ = ["encode"]

_FIGURES = re.compile(r"▁?-?\d+|▁\?")  # a question mark behind a space stands only where a word has no value


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, joint: str = ""
) -> list[dict[str, list[int]]]:
    """Tokenise examples; the loss falls on the completion and the end of text.

    An example without a completion is a row of keys and values: its loss falls on the figures in the prompt and on the
    sign that stands for "no value". ``joint`` is what a tokenizer that adds no space itself needs between a prompt and
    its completion.
    """
    prompts = tokenizer([e.prompt for e in examples]).input_ids
    completions = tokenizer([joint + e.completion for e in examples], add_special_tokens=False).input_ids
    figures = {i for token, i in tokenizer.get_vocab().items() if _FIGURES.fullmatch(token)}
    rows = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        if example.completion:
            target = [*completion, tokenizer.eos_token_id]
            rows.append({"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target})
        else:
            rows.append({"input_ids": prompt, "labels": _values_only(prompt, figures, ends=bool(joint))})
    return rows


def _values_only(ids: list[int], figures: set[int], ends: bool) -> list[int]:
    """Labels of a row: its values, and where those are spelled in digits also what ends them."""
    before = [IGNORED, *ids]
    return [i if i in figures or (ends and b in figures) else IGNORED for i, b in zip(ids, before, strict=False)]
