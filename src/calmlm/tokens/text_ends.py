"""What stands around a text: what its tokenizer puts there, and what a model is taught to end with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["around", "end_of", "ends_of", "without_appended"]


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before any text, and those that it puts behind, such as ``[CLS]``, ``[SEP]``."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    for start in range(len(whole) - len(plain), -1, -1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def without_appended(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """The tokens of a text without what its tokenizer has put behind it; such a token inside the text stays.

    Args:
        ids: as the tokenizer gives them, with its special tokens.
        tokenizer: it.
    """
    found = list(ids)
    if not found or found[-1] not in tokenizer.all_special_ids:
        return found
    _, behind = around(tokenizer)
    return found[: -len(behind)] if behind and found[-len(behind) :] == behind else found


def end_of(tokenizer: Any) -> int | None:
    """The token that ends a text: the end of text, or else the last one that the tokenizer puts behind any text."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    _, behind = around(tokenizer)
    return behind[-1] if behind else None


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end what a model writes: those of its generation settings, or else the one that ends a text."""
    given = model.generation_config.eos_token_id
    found = given if isinstance(given, list) else [end_of(tokenizer) if given is None else given]
    return frozenset(token for token in found if token is not None)
